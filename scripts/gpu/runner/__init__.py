"""The whole runner on an 8B shape: the shape, its rows, and the times of its steps."""
