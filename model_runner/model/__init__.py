"""The decoder: its layers, the variants of model families, and loading."""
