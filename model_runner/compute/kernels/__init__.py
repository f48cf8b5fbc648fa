"""Kernels for triton (CUDA) and for a CPU (C++)."""
