"""What of the compiled functions a caller has found so far: a look-up of well under a microsecond for its every call.

Knows nothing of when and how they are compiled.
"""

from __future__ import annotations

import torch

from model_runner.compute.kernels.cpu.functions.program import Function, Kernel
from model_runner.compute.kernels.cpu.kernels import Kernels
from model_runner.platform.device import dtype_name


class Found:
    """Nothing, until `use` says where to look."""

    def __init__(self) -> None:
        self._kernels: Kernels | None = None
        self._found: dict[tuple[str, torch.dtype], Kernel] = {}

    def use(self, kernels: Kernels) -> None:
        """From now on functions come from there, once they are ready."""
        self._kernels = kernels if kernels.when != "never" else None
        self._found.clear()

    def get(self, name: str, dtype: torch.dtype) -> Kernel | None:
        """The compiled function, where there is one by now."""
        if self._kernels is None:
            return None
        kernel = self._found.get((name, dtype))
        if kernel is None:
            kernel = self._kernels.get(Function(name, dtype_name(dtype)))
            if kernel is not None:
                self._found[name, dtype] = kernel
        return kernel
