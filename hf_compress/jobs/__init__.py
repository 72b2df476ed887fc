"""The single commands: one step on one text classifier, in a folder that can be continued."""
