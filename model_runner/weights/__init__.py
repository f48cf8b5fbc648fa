"""Checkpoint tensors, and how linear weights are stored."""
