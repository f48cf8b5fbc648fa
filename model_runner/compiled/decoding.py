"""Attention of a step's decodes, to be compiled from decodes.cpp: each row's one token over the slots it sees.

Legend: T tokens, C rows of one token each, N query heads, K key/value heads, G = N / K, D head size, M slots of the
cache.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from model_runner.compiled.program import Draw, Function, Program
from model_runner.device import DTYPES

SHAPES = ((6, 2, 64), (4, 4, 32), (10, 1, 96))
"""N, K, D."""


def fits(heads: int, kv_heads: int, size: int, dtype: torch.dtype) -> bool:
    """Whether they are written for such heads: those that are read in whole vectors."""
    return heads % kv_heads == 0 and size % {torch.bfloat16: 32, torch.float32: 16}.get(dtype, size + 1) == 0


class Decodes(nn.Module):
    """Writes each row's mix of values to its token's place in `out`."""

    def forward(
        self,
        q_TND: torch.Tensor,
        k_MKD: torch.Tensor,
        v_MKD: torch.Tensor,
        out_TND: torch.Tensor,
        sizes: torch.Tensor,
        scale: torch.Tensor,
        plan: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        rows, groups = int(plan[0]), int(sizes[0] // sizes[1])
        tokens_C, stops_C, slots = torch.split(plan[1:], [rows, rows, len(plan) - 1 - 2 * rows])
        begin = 0
        for token, stop in zip(tokens_C.tolist(), stops_C.tolist(), strict=True):
            k, v = (cache[slots[begin:stop]].float().repeat_interleave(groups, 1) for cache in (k_MKD, v_MKD))
            scores_NL = torch.einsum("nd,lnd->nl", q_TND[token].float(), k) * scale
            shares_NL = scores_NL.softmax(-1).to(q_TND.dtype).float()
            out_TND[token] = torch.einsum("nl,lnd->nd", shares_NL, v).to(out_TND.dtype)
            begin = stop
        return ()


def decodes(function: Function) -> Program:
    """[q [T, N, D], k and v [M, K, D], out [T, N, D], sizes [N, K, D], scale [1] float32, plan [C, the rows' tokens,
    where each row's slots end, the slots, row after row] int64] -> [], out changed at these tokens. `fits` holds.
    """
    dtype = DTYPES[function.dtype]

    def arguments(size: int) -> tuple[torch.Tensor, ...]:
        draw, (heads, kv_heads, width) = Draw(dtype), SHAPES[size % len(SHAPES)]
        seen_C = torch.arange(size) * 37 % 150 + 1
        slots = torch.arange(int(seen_C.sum())) * 7 % 311
        plan = torch.cat([torch.tensor([size]), torch.arange(size).flip(0) + 1, seen_C.cumsum(0), slots])
        tokens = [draw(size + 1, heads, width) for _ in range(2)]
        caches = [draw(311, kv_heads, width) for _ in range(2)]
        sizes = torch.tensor([heads, kv_heads, width])
        return tokens[0], *caches, tokens[1], sizes, torch.tensor([width**-0.5]), plan

    defines = ("BFLOAT16",) if dtype is torch.bfloat16 else ()
    return Program(Decodes(), arguments, source=Path(__file__).with_name("decodes.cpp"), defines=defines)
