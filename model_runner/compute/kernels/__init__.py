"""Kernels in triton for CUDA and in C++ for CPUs."""
