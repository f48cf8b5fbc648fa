"""The target that kernels are tiled for: a GPU's generation and multiprocessors, or triton's interpreter."""

from __future__ import annotations

import functools

import torch

from model_runner.compute.kernels.triton.interpreter import interpreting

INTERPRETER = 0


@functools.cache
def capability(device: torch.device) -> int:
    """Returns the GPU's compute capability, such as 90 for Hopper; INTERPRETER in triton's interpreter."""
    if interpreting():
        return INTERPRETER
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def processors(device: torch.device) -> int:
    """Returns the GPU's number of multiprocessors; 1 in the interpreter, which runs one program after another."""
    return 1 if interpreting() else torch.cuda.get_device_properties(device).multi_processor_count
