"""What of the compiled functions a caller has found so far: a look-up of well under a microsecond for its every call.

Knows nothing of when and how they are compiled.
"""

from __future__ import annotations

import torch

from model_runner.compiled.kernels import Kernels
from model_runner.compiled.program import Function, Kernel
from model_runner.device import dtype_name


class Found:
    """Nothing, until `use` says where to look."""

    def __init__(self) -> None:
        self._kernels: Kernels | None = None
        self._found: dict[tuple[str, tuple[int, ...], torch.dtype, tuple[float, ...], int], Kernel] = {}

    def use(self, kernels: Kernels) -> None:
        """From now on functions come from there, once they are ready."""
        self._kernels = kernels if kernels.when != "never" else None

    def look(self, function: Function) -> Kernel | None:
        """The compiled function, where there is one by now; for whoever keeps what it is given."""
        return None if self._kernels is None else self._kernels.get(function)

    def get(
        self, name: str, sizes: tuple[int, ...], dtype: torch.dtype, numbers: tuple[float, ...] = (), threads: int = 0
    ) -> Kernel | None:
        """The compiled function, where there is one by now."""
        if self._kernels is None:
            return None
        key = name, sizes, dtype, numbers, threads
        kernel = self._found.get(key)
        if kernel is None:
            kernel = self.look(Function(name, sizes, dtype_name(dtype), numbers, threads))
            if kernel is not None:
                self._found[key] = kernel
        return kernel
