"""Chat templates: the model's own in this process, those of adapters in a process of their own."""
