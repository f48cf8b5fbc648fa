"""tanh and sigmoid for kernels, computed from exp only: equal in all triton versions and in triton's interpreter,
without overflow.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """Returns tanh(x) with an absolute error near 1e-7."""
    small = tl.exp(-2.0 * tl.abs(x))
    size = (1.0 - small) / (1.0 + small)
    return tl.where(x < 0, -size, size)


@triton.jit
def sigmoid(x):
    """Returns 1 / (1 + exp(-x))."""
    small = tl.exp(-tl.abs(x))
    return tl.where(x < 0, small, 1.0) / (1.0 + small)
