"""Causal attention of a step, to be compiled from attention.cpp: each row's tokens over the slots it sees.

Legend: T tokens, C rows, n tokens of one row, L slots that it sees, N query heads, K key/value heads, G = N / K, D head
size, M slots of the cache.
"""

from __future__ import annotations

import torch

from model_runner.compute.kernels.cpu.functions.program import Argument, Draw, Program, source

SHAPES = ((6, 2, 64), (4, 4, 32), (10, 1, 96))
"""N, K, D."""

LENGTHS = (1, 1, 5, 1, 40)
"""n, row after row."""


def fits(heads: int, kv_heads: int, size: int, dtype: torch.dtype) -> bool:
    """Whether it is written for such heads: those that are read in whole vectors."""
    return heads % kv_heads == 0 and size % {torch.bfloat16: 32, torch.float32: 16}.get(dtype, size + 1) == 0


def attend(dtype: torch.dtype) -> Program:
    """(q [T, N, D], k and v [M, K, D], out [T, N, D], plan, N, K, D, scale): writes out at the tokens of the plan.

    plan        int64: C, the rows' first tokens, how many each has, where each one's slots end, the slots, row after
                row. A row's last token sees all of its slots, the one before it one less. `fits` holds
    """

    def arguments(size: int) -> tuple[Argument, ...]:
        draw, (heads, kv_heads, width) = Draw(dtype), SHAPES[size % len(SHAPES)]
        lengths_C = torch.tensor([LENGTHS[row % len(LENGTHS)] for row in range(size)])
        seen_C = torch.arange(size) * 37 % 150 + lengths_C
        slots = torch.arange(int(seen_C.sum())) * 7 % 311
        tokens, stops_C = int(lengths_C.sum()), lengths_C.cumsum(0)
        plan = torch.cat([torch.tensor([size]), tokens + 1 - stops_C, lengths_C, seen_C.cumsum(0), slots])
        q, out = (draw(tokens + 1, heads, width) for _ in range(2))
        caches = [draw(311, kv_heads, width) for _ in range(2)]
        return q, *caches, out, plan, heads, kv_heads, width, width**-0.5

    return Program(source("attention.cpp"), _attend, arguments)


def _attend(
    q_TND: torch.Tensor,
    k_MKD: torch.Tensor,
    v_MKD: torch.Tensor,
    out_TND: torch.Tensor,
    plan: torch.Tensor,
    heads: int,
    kv_heads: int,
    size: int,
    scale: float,
) -> None:
    rows, groups, begin = int(plan[0]), heads // kv_heads, 0
    firsts_C, lengths_C, stops_C, slots = torch.split(plan[1:], [rows, rows, rows, len(plan) - 1 - 3 * rows])
    for first, length, stop in zip(firsts_C.tolist(), lengths_C.tolist(), stops_C.tolist(), strict=True):
        k, v = (cache[slots[begin:stop]].float().repeat_interleave(groups, 1) for cache in (k_MKD, v_MKD))
        seen, here = stop - begin, slice(first, first + length)
        later_nL = torch.arange(seen) > torch.arange(seen - length, seen)[:, None]
        scores_NnL = torch.einsum("tnd,lnd->ntl", q_TND[here].float(), k) * scale
        shares_NnL = scores_NnL.masked_fill(later_nL, -torch.inf).softmax(-1).to(q_TND.dtype).float()
        out_TND[here] = torch.einsum("ntl,lnd->tnd", shares_NnL, v).to(out_TND.dtype)
        begin = stop
