"""The table of CPU kernels by name.

A cached library depends on the module that makes its spec, on its C++ source and on the headers beside it; a change to
any of these makes the library stale, so a kernel must not depend on other files.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from model_runner.compute.kernels.cpu.functions import attention, delta, gate, norm, rope
from model_runner.compute.kernels.cpu.functions.spec import KernelKey, KernelSpec
from model_runner.platform.device import DTYPES

SPECS: dict[str, Callable[[torch.dtype], KernelSpec]] = {
    "add_norm": norm.add_norm,
    "silu_mul": gate.silu_mul,
    "rope_and_store": rope.rope_and_store,
    "attend": attention.attend,
    "delta": delta.delta,
}


def spec_for(key: KernelKey) -> KernelSpec:
    """Returns the spec of the kernel that the key names, for the key's dtype."""
    return SPECS[key.name](DTYPES[key.dtype])
