"""What is to be done: recipes as dataclasses and as YAML."""
