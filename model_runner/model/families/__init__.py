"""The decoder, and how it is loaded."""
