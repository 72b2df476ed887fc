"""What a model is: the only folder that knows architectures."""
