"""A rank's shard of the model: which part of a dimension it holds, and the sum over ranks. One rank for now.

Does not know layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.errors import ConfigError


@dataclass(frozen=True)
class Shard:
    """Rank `rank` of a tensor-parallel group of `size`."""

    rank: int = 0
    size: int = 1

    def share(self, whole: int, what: str) -> int:
        """How much of a dimension of size `whole` this rank holds. Raises ConfigError if the ranks do not divide it."""
        if whole % self.size:
            raise ConfigError(f"--tp-size {self.size} does not divide the model's {what} ({whole})")
        return whole // self.size

    def span(self, whole: int, what: str) -> slice:
        """Which part of a dimension of size `whole` this rank holds."""
        share = self.share(whole, what)
        return slice(self.rank * share, (self.rank + 1) * share)

    def all_reduce(self, partial: torch.Tensor) -> torch.Tensor:
        """The sum of every rank's `partial`; the identity for one rank."""
        assert self.size == 1, "the collective comes with tensor parallelism"
        return partial
