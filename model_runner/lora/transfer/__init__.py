"""Loads adapters in niced children of the runner (`-m model_runner.lora.transfer`), which return shared memory."""
