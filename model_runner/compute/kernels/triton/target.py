"""What kernels are cut for: a GPU's generation and its multiprocessors, or triton's interpreter."""

from __future__ import annotations

import functools

import torch

from model_runner.compute.kernels.triton.interpreter import interpreting

INTERPRETER = 0


@functools.cache
def capability(device: torch.device) -> int:
    """90 for Hopper; INTERPRETER where there is no GPU to compile for."""
    if interpreting():
        return INTERPRETER
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of the device; one where the interpreter runs the programs one by one."""
    return 1 if interpreting() else torch.cuda.get_device_properties(device).multi_processor_count
