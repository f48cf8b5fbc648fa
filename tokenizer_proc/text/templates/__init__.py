"""Chat templates. The model's own is rendered in this process, those of adapters in a separate process."""
