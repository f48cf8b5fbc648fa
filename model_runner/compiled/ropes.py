"""What stands between qkv and attention, to be compiled: heads turned, K and V put into their slots.

Legend: T tokens, N query heads, K key/value heads, J = N + 2 K, D head size, E half of what is turned of a head, M
slots of the cache.
"""

from __future__ import annotations

import torch
from torch import nn

from model_runner.compiled.program import Draw, Function, Program
from model_runner.device import DTYPES


class RopeAndStore(nn.Module):
    """q turned; k turned and v are stored."""

    def __init__(self, kv_heads: int, half: int) -> None:
        super().__init__()
        self.kv_heads = kv_heads
        self.turns = half

    def forward(
        self,
        qkv_TJD: torch.Tensor,
        cos_T1E: torch.Tensor,
        sin_T1E: torch.Tensor,
        k_MKD: torch.Tensor,
        v_MKD: torch.Tensor,
        slots_T: torch.Tensor,
    ) -> torch.Tensor:
        turned = self._turn(qkv_TJD[:, : -self.kv_heads], cos_T1E, sin_T1E)
        k_MKD.index_put_((slots_T,), turned[:, -self.kv_heads :])
        v_MKD.index_put_((slots_T,), qkv_TJD[:, -self.kv_heads :])
        return turned[:, : -self.kv_heads].clone()

    def _turn(self, x_TND: torch.Tensor, cos_T1E: torch.Tensor, sin_T1E: torch.Tensor) -> torch.Tensor:
        first, second, still = torch.split(x_TND, [self.turns, self.turns, x_TND.shape[-1] - 2 * self.turns], -1)
        turned = (first * cos_T1E - second * sin_T1E, second * cos_T1E + first * sin_T1E)
        return torch.cat((*turned, still), -1)


def rope_and_store(function: Function) -> Program:
    """`sizes` (N, K, D, E): [qkv [T, J, D], cos, sin [T, 1, E], k and v [M, K, D], slots [T]] -> [q [T, N, D]], the
    caches changed. Slots are distinct.
    """
    heads, kv_heads, size_D, half = function.sizes

    def arguments(size: int) -> tuple[torch.Tensor, ...]:
        draw = Draw(DTYPES[function.dtype])
        caches = (draw(2 * size, kv_heads, size_D) for _ in range(2))
        turns = (draw(size, 1, half) for _ in range(2))
        return draw(size, heads + 2 * kv_heads, size_D), *turns, *caches, torch.arange(size).flip(0) * 2

    tokens, slots = {0: "T"}, {0: "M"}
    return Program(RopeAndStore(kv_heads, half), arguments, (tokens, tokens, tokens, slots, slots, tokens))
