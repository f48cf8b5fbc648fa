"""Building the C++ functions in a niced child: `python -P -m model_runner.compute.kernels.cpu.compilation`."""
