"""The decoder: layers, families, and loading."""
