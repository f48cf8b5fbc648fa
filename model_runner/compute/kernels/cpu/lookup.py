"""A cached look-up of CPU kernels for hot paths, which takes well under a microsecond."""

from __future__ import annotations

import torch

from model_runner.compute.kernels.cpu.functions.spec import Kernel, KernelKey
from model_runner.compute.kernels.cpu.kernels import KernelSet
from model_runner.platform.device import dtype_name


class KernelLookup:
    """Looks up kernels of a kernel set by name and dtype. Finds none before `use` has set the kernel set."""

    def __init__(self) -> None:
        self._kernels: KernelSet | None = None
        self._cached: dict[tuple[str, torch.dtype], Kernel] = {}

    def use(self, kernels: KernelSet) -> None:
        """Sets the kernel set in which kernels are looked up."""
        self._kernels = kernels if kernels.build_mode != "never" else None
        self._cached.clear()

    def get(self, name: str, dtype: torch.dtype) -> Kernel | None:
        """Returns the kernel, or None if it is not built (yet)."""
        if self._kernels is None:
            return None
        kernel = self._cached.get((name, dtype))
        if kernel is None:
            kernel = self._kernels.get(KernelKey(name, dtype_name(dtype)))
            if kernel is not None:
                self._cached[name, dtype] = kernel
        return kernel
