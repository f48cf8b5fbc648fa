"""Attention to be compiled: over gathered slots, as two batched matmuls, the heads of one key/value head in a row.

    q [C, K, G, D] K^T [C, K, D, L] -> softmax in float32 -> [C, K, G, L] V [C, K, L, D]

Legend: C rows of one token each, n tokens of one row, L slots that are seen, N query heads, K key/value heads,
G = N / K, D head size, M slots of the cache.
"""

from __future__ import annotations

import torch
from torch import nn

from model_runner.compiled.program import Draw, Function, Program
from model_runner.device import DTYPES

UNSEEN = -1e30
"""What is added to the score of a slot that is not seen."""


class _Heads(nn.Module):
    """What both have: the sizes, and the scale."""

    def __init__(self, heads: int, kv_heads: int, size: int, scale: float) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.size, self.scale = heads, kv_heads, size, scale
        self.queries = heads // kv_heads


class Decodes(_Heads):
    """One token for each of some rows. `wide`: matmuls in float32, which for very few rows takes less time too."""

    def __init__(self, heads: int, kv_heads: int, size: int, wide: int, scale: float) -> None:
        super().__init__(heads, kv_heads, size, scale)
        self.wide = bool(wide)

    def forward(
        self,
        q_CND: torch.Tensor,
        k_MKD: torch.Tensor,
        v_MKD: torch.Tensor,
        slots_CL: torch.Tensor,
        bias_CL: torch.Tensor,
    ) -> torch.Tensor:
        (rows, seen), dtype = slots_CL.shape, torch.float32 if self.wide else q_CND.dtype
        heads_K1 = torch.arange(self.kv_heads)[:, None]
        places_CKL = slots_CL[:, None, :] * self.kv_heads + heads_K1
        k, v = (
            cache.view(-1, self.size)[places_CKL].to(dtype).view(rows * self.kv_heads, seen, self.size)
            for cache in (k_MKD, v_MKD)
        )
        q = q_CND.to(dtype).view(rows * self.kv_heads, self.queries, self.size)
        scores = torch.bmm(q, k.transpose(1, 2)).float().view(rows, self.heads, seen)
        shares = (scores * self.scale + bias_CL[:, None]).softmax(-1).to(dtype)
        mixed = torch.bmm(shares.view(rows * self.kv_heads, self.queries, seen), v)
        return mixed.to(q_CND.dtype).view(rows, self.heads, self.size)


class Prefill(_Heads):
    """The newest n tokens of one row, each of which sees what is before it, and itself."""

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


def decodes(function: Function) -> Program:
    """`sizes` (N, K, D, 1 for float32), `numbers` (scale,): [q [C, N, D], k and v [M, K, D], slots [C, L], bias [C, L]
    float32] -> [[C, N, D]]. The bias is 0 where a slot is seen, else UNSEEN.
    """
    heads, kv_heads, size_D, wide = function.sizes
    (scale,) = function.numbers

    def arguments(size: int) -> tuple[torch.Tensor, ...]:
        draw, seen = Draw(DTYPES[function.dtype]), 3 * size + 8
        bias_CL = torch.where(torch.arange(seen)[None] <= torch.arange(size)[:, None] + 4, 0.0, UNSEEN)
        slots_CL = (torch.arange(size * seen) * 7 % (2 * seen)).view(size, seen)
        caches = (draw(2 * seen, kv_heads, size_D) for _ in range(2))
        return draw(size, heads, size_D), *caches, slots_CL, bias_CL

    pool, pairs = {0: "M"}, {0: "C", 1: "L"}
    return Program(Decodes(heads, kv_heads, size_D, wide, scale), arguments, ({0: "C"}, pool, pool, pairs, pairs))


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
