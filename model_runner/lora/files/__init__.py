"""Reads adapter files safely: regular files only, headers checked before data."""
