"""One site at one point: inputs, the base's weights, the adapters, in copies enough that no cache holds them all.

Adapters are whole tensors of their true rank here; every column packs them its own way. Legend: T tokens, I in
features, O out features, r rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import linear

from gpu.grid import Point, SiteShape

BASES = 2  # copies of the base's weight: each alone is about as large as an L2
MOST_COPIES = 12

Adapter = tuple[list[torch.Tensor], torch.Tensor]
"""A of every slice [r, I], and B of all slices side by side [O, r]."""

Run = Callable[[int], torch.Tensor]
"""Computes base and adapters with copy number .. and returns [T, O]."""


@dataclass(frozen=True, eq=False)
class Case:
    """The tensors; `copies` of the adapters."""

    site: SiteShape
    point: Point
    x_TI: torch.Tensor
    bases: list[torch.Tensor]
    copies: list[list[Adapter]]

    @property
    def device(self) -> torch.device:
        """Where it all is."""
        return self.x_TI.device

    @property
    def most_rank(self) -> int:
        """What others pad to."""
        return max(self.point.ranks)

    @property
    def offsets(self) -> list[int]:
        """Where each slice begins among the outputs, and where the last one ends."""
        return [sum(self.site.slices[:index]) for index in range(len(self.site.slices) + 1)]

    def base(self, copy: int) -> torch.Tensor:
        """[T, O]: the base alone."""
        return linear(self.x_TI, self.bases[copy % len(self.bases)])

    def expected(self, copy: int) -> torch.Tensor:
        """[T, O] float32: what every column should answer."""
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
    """Random values; as many copies of the adapters as twice the cache holds, from 2 up to a dozen."""
    draw = torch.Generator(device=device).manual_seed(seed)

    def noise(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=draw, device=device) / columns**0.5).to(dtype)

    each = site.lora_bytes(point.ranks) + site.inputs * site.outputs * dtype.itemsize
    copies = max(2, min(MOST_COPIES, -(-2 * cache_bytes // each)))
    adapters = [
        [([noise(rank, site.inputs) for _ in site.slices], noise(site.outputs, rank)) for rank in point.ranks]
        for _ in range(copies)
    ]
    x_TI = noise(point.tokens, site.inputs) * site.inputs**0.5
    return Case(site, point, x_TI, [noise(site.outputs, site.inputs) for _ in range(BASES)], adapters)
