"""Adapters: the registry of their names, loading and unloading, and the tokenizers that they bring."""
