"""Every function that can be compiled, by name. A maker's module, its C++ and the headers beside it are the whole truth
of it: a change there, and nowhere else, makes what was compiled before stale.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from model_runner.compute.kernels.cpu.functions import attention, delta, gate, norm, rope
from model_runner.compute.kernels.cpu.functions.program import Function, Program
from model_runner.platform.device import DTYPES

FUNCTIONS: dict[str, Callable[[torch.dtype], Program]] = {
    "add_norm": norm.add_norm,
    "silu_mul": gate.silu_mul,
    "rope_and_store": rope.rope_and_store,
    "attend": attention.attend,
    "delta": delta.delta,
}


def program(function: Function) -> Program:
    """What is to be compiled of it."""
    return FUNCTIONS[function.name](DTYPES[function.dtype])
