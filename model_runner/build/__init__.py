"""Builds a runner from its config: plans what fits into memory, then creates the parts and connects them."""
