"""CUDA graphs of decode steps: the capture of device work, and the graphs of all batch sizes."""
