"""How the base model's linears are stored and multiplied: one file a format."""
