"""One site at one point of the grid: inputs, base weights, and adapter copies that together exceed the cache.

Adapters are whole tensors of their true rank; every column (backend or peer) packs them in its own way. Legend:
T tokens, I input features, O output features, r rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import linear

from gpu.grid import Point, SiteShape

BASES = 2  # number of copies of the base's weight; each is about as large as an L2 cache
MAX_COPIES = 12

Adapter = tuple[list[torch.Tensor], torch.Tensor]
"""A of every slice, [r, I] each, and B of all slices side by side, [O, r]."""

Run = Callable[[int], torch.Tensor]
"""Computes base and adapters with the copy of this number; returns [T, O]."""


@dataclass(frozen=True, eq=False)
class Case:
    """The tensors of one case; `copies` holds the copies of the adapters."""

    site: SiteShape
    point: Point
    x_TI: torch.Tensor
    bases: list[torch.Tensor]
    copies: list[list[Adapter]]

    @property
    def device(self) -> torch.device:
        """The device of all tensors."""
        return self.x_TI.device

    @property
    def max_rank(self) -> int:
        """The largest rank; some peers pad all adapters to it."""
        return max(self.point.ranks)

    @property
    def offsets(self) -> list[int]:
        """The start of each slice among the outputs, and the end of the last slice."""
        return [sum(self.site.slices[:index]) for index in range(len(self.site.slices) + 1)]

    def base(self, copy: int) -> torch.Tensor:
        """Returns the output of the base without adapters, [T, O]."""
        return linear(self.x_TI, self.bases[copy % len(self.bases)])

    def expected(self, copy: int) -> torch.Tensor:
        """Returns the reference result, [T, O] in float32."""
        y_TO = linear(self.x_TI.float(), self.bases[copy % len(self.bases)].float())
        lanes_T = torch.tensor(self.point.lane_of_token, device=self.device)
        for lane, (a_slices, b_Or) in enumerate(self.copies[copy]):
            rows = torch.nonzero(lanes_T == lane)[:, 0]
            for index, a_rI in enumerate(a_slices):
                here = slice(self.offsets[index], self.offsets[index + 1])
                y_TO[rows, here] += self.x_TI[rows].float() @ a_rI.float().T @ b_Or[here].float().T
        return y_TO


def make_case(
    site: SiteShape, point: Point, device: torch.device, dtype: torch.dtype, cache_bytes: int, seed: int = 0
) -> Case:
    """Makes a case of random values, with 2 to MAX_COPIES copies of the adapters: together twice the cache."""
    draw = torch.Generator(device=device).manual_seed(seed)

    def noise(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=draw, device=device) / columns**0.5).to(dtype)

    each = site.lora_bytes(point.ranks) + site.inputs * site.outputs * dtype.itemsize
    copies = max(2, min(MAX_COPIES, -(-2 * cache_bytes // each)))
    adapters = [
        [([noise(rank, site.inputs) for _ in site.slices], noise(site.outputs, rank)) for rank in point.ranks]
        for _ in range(copies)
    ]
    x_TI = noise(point.tokens, site.inputs) * site.inputs**0.5
    return Case(site, point, x_TI, [noise(site.outputs, site.inputs) for _ in range(BASES)], adapters)
