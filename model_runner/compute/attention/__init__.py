"""Attention over paged caches: one small base class, and its backends."""
