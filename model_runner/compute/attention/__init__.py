"""Attention over the paged KV cache: one base class and its backends."""
