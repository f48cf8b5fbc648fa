"""Loads adapters in niced children of the runner (`-m model_runner.lora.loading`), which return shared memory."""
