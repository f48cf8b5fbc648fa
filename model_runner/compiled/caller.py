"""Who calls compiled functions. Knows none of them."""

from __future__ import annotations

import torch

from model_runner.arch import Arch
from model_runner.compiled.kernels import Kernels
from model_runner.compiled.program import Function


class Caller:
    """Calls none, as whoever has kernels of its own."""

    def functions(self, arch: Arch, dtype: torch.dtype) -> list[Function]:
        """Those it would call for this model."""
        return []

    def use(self, kernels: Kernels) -> None:
        """Where they are to be found, once they are compiled."""
