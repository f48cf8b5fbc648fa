"""Loads adapters into shared memory, in low-priority children of the runner (`-m model_runner.lora.loading`)."""
