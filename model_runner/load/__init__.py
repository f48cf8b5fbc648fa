"""Reading adapters in niced children of the runner, which hand over shared memory: `python -P -m model_runner.load`."""
