"""A cached look-up of CPU kernels for hot paths, well under a microsecond a call. Does not know how they are built."""

from __future__ import annotations

import torch

from model_runner.compute.kernels.cpu.functions.spec import Kernel, KernelKey
from model_runner.compute.kernels.cpu.kernels import KernelSet
from model_runner.platform.device import dtype_name


class KernelLookup:
    """Finds no kernel until `use` names a kernel set."""

    def __init__(self) -> None:
        self._kernels: KernelSet | None = None
        self._cached: dict[tuple[str, torch.dtype], Kernel] = {}

    def use(self, kernels: KernelSet) -> None:
        """Looks kernels up in `kernels` from now on."""
        self._kernels = kernels if kernels.build_mode != "never" else None
        self._cached.clear()

    def get(self, name: str, dtype: torch.dtype) -> Kernel | None:
        """The kernel, or None where it is not built (yet)."""
        if self._kernels is None:
            return None
        kernel = self._cached.get((name, dtype))
        if kernel is None:
            kernel = self._kernels.get(KernelKey(name, dtype_name(dtype)))
            if kernel is not None:
                self._cached[name, dtype] = kernel
        return kernel
