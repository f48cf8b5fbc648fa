"""Checks tokenizer files of adapters in a process of its own, before this process parses any part of them."""
