"""Adapters by name: registry, selection, loading and unloading, sources, and their tokenizers."""
