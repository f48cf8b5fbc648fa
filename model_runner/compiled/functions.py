"""Every function that can be compiled, by name. A maker's module, its C++ and the headers beside it are the whole truth
of it: a change there, and nowhere else, makes what was compiled before stale.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from model_runner.compiled import attending, deltas, gates, norms, ropes
from model_runner.compiled.program import Function, Program
from model_runner.device import DTYPES

FUNCTIONS: dict[str, Callable[[torch.dtype], Program]] = {
    "add_norm": norms.add_norm,
    "silu_mul": gates.silu_mul,
    "rope_and_store": ropes.rope_and_store,
    "attend": attending.attend,
    "delta": deltas.delta,
}


def program(function: Function) -> Program:
    """What is to be compiled of it."""
    return FUNCTIONS[function.name](DTYPES[function.dtype])
