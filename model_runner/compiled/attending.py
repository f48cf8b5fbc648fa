"""Attention of one longer chunk to be compiled: over gathered slots, as two batched matmuls, the heads of one key/value
head in a row.

    q [K, n G, D] K^T [K, D, L] -> softmax in float32 -> [K, n G, L] V [K, L, D]

Legend: n tokens of one row, L slots that are seen, N query heads, K key/value heads, G = N / K, D head size, M slots of
the cache.
"""

from __future__ import annotations

import torch
from torch import nn

from model_runner.compiled.program import Draw, Function, Program
from model_runner.device import DTYPES


class Prefill(nn.Module):
    """The newest n tokens of one row, each of which sees what is before it, and itself."""

    def __init__(self, heads: int, kv_heads: int, size: int, scale: float) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.size, self.scale = heads, kv_heads, size, scale
        self.queries = heads // kv_heads

    def forward(
        self, q_nND: torch.Tensor, k_MKD: torch.Tensor, v_MKD: torch.Tensor, slots_L: torch.Tensor
    ) -> torch.Tensor:
        length, seen, kv_heads, size = q_nND.shape[0], slots_L.shape[0], self.kv_heads, self.size
        k_KLD, v_KLD = (cache[slots_L].transpose(0, 1) for cache in (k_MKD, v_MKD))
        q_KnGD = q_nND.view(length, kv_heads, self.queries, size).transpose(0, 1).contiguous()
        q = q_KnGD.view(kv_heads, length * self.queries, size)
        scores = torch.bmm(q, k_KLD.transpose(1, 2)).view(kv_heads, length, self.queries, seen)
        later_nL = torch.arange(seen)[None] > torch.arange(length)[:, None] + (seen - length)
        scores = (scores.float() * self.scale).masked_fill(later_nL[:, None], -torch.inf)
        shares = scores.softmax(-1).to(q_nND.dtype).view(kv_heads, length * self.queries, seen)
        mixed = torch.bmm(shares, v_KLD).view(kv_heads, length, self.queries * size)
        return mixed.transpose(0, 1).reshape(length, self.heads, size)


def prefill(function: Function) -> Program:
    """`sizes` (N, K, D), `numbers` (scale,): [q [n, N, D], k and v [M, K, D], slots [L]] -> [[n, N, D]]; L >= n."""
    heads, kv_heads, size_D = function.sizes
    (scale,) = function.numbers

    def arguments(size: int) -> tuple[torch.Tensor, ...]:
        draw, seen = Draw(DTYPES[function.dtype]), 2 * size + 3
        caches = (draw(2 * seen, kv_heads, size_D) for _ in range(2))
        return draw(size, heads, size_D), *caches, torch.arange(seen) * 3 % (2 * seen)

    pool = {0: "M"}
    return Program(Prefill(heads, kv_heads, size_D, scale), arguments, ({0: "n"}, pool, pool, {0: "L"}))
