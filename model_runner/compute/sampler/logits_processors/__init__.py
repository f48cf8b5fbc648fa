"""Logits processors: each changes the logits of the rows that use it, before temperature and filters.

To add one, write a module here with a LogitsProcessor and put the class into the list in registry.py.
"""
