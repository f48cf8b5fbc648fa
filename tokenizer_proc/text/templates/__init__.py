"""Chat templates: the model's own, and those of adapters in a process of their own."""
