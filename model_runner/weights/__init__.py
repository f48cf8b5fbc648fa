"""Checkpoint files, and how their tensors fill the weights."""
