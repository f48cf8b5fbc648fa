"""Builds the C++ kernels in a niced child process: `python -P -m model_runner.compute.kernels.cpu.compilation`."""
