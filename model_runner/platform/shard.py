"""One rank's shard of the model: the part of a dimension that the rank holds, and sums over all ranks.

Only one rank is supported so far. Does not depend on layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.errors import ConfigError


@dataclass(frozen=True)
class Shard:
    """The shard of rank `rank` in a tensor-parallel group of `size` ranks."""

    rank: int = 0
    size: int = 1

    def share(self, whole: int, what: str) -> int:
        """Returns the size of this rank's part of a dimension of size `whole`, which is called `what` in errors.

        Raises ConfigError if the number of ranks does not divide `whole`.
        """
        if whole % self.size:
            raise ConfigError(f"--tp-size {self.size} does not divide the model's {what} ({whole})")
        return whole // self.size

    def span(self, whole: int, what: str) -> slice:
        """Returns the indices of this rank's part of a dimension of size `whole`. Raises ConfigError like `share`."""
        share = self.share(whole, what)
        return slice(self.rank * share, (self.rank + 1) * share)

    def all_reduce(self, partial: torch.Tensor) -> torch.Tensor:
        """Returns the sum of all ranks' `partial`; with one rank, `partial` itself."""
        assert self.size == 1, "the collective comes with tensor parallelism"
        return partial
