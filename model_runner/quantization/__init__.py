"""The formats in which the base model's linears are stored and multiplied, each in its own file."""
