"""Causal attention of a step over the slots that each row sees: the spec and reference of attention.cpp.

Legend: T tokens, C rows, n tokens of one row, L slots that it sees, N query heads, K key/value heads, G = N / K, D head
size, M slots of the cache.
"""

from __future__ import annotations

import torch

from model_runner.compute.kernels.cpu.functions.spec import Argument, KernelSpec, RandomTensors, source

SHAPES = ((6, 2, 64), (4, 4, 32), (10, 1, 96))
"""The sizes (N, K, D) that the kernel is checked with."""

LENGTHS = (1, 1, 5, 1, 40)
"""The numbers of tokens n that the kernel is checked with; the rows take them in turn."""


def supports(heads: int, kv_heads: int, size: int, dtype: torch.dtype) -> bool:
    """Whether the kernel supports these sizes: `heads` must be a multiple of `kv_heads`, and the head size `size` a
    multiple of the values that the kernel processes at once (32 in bfloat16, 16 in float32).
    """
    return heads % kv_heads == 0 and size % {torch.bfloat16: 32, torch.float32: 16}.get(dtype, size + 1) == 0


def attend(dtype: torch.dtype) -> KernelSpec:
    """Returns the spec of a kernel that writes the attention of the plan's tokens to out. Its arguments are
    (q [T, N, D], k and v [M, K, D], out [T, N, D], plan, N, K, D, scale), with N, K and D that `supports` accepts.

    plan        int64: C, each row's first token, each row's number of tokens, where each row's slots end, the slots of
                all rows. A row's last token sees all slots of the row, the token before it one fewer, and so on.
    """

    def arguments(size: int) -> tuple[Argument, ...]:
        random, (heads, kv_heads, width) = RandomTensors(dtype), SHAPES[size % len(SHAPES)]
        lengths_C = torch.tensor([LENGTHS[row % len(LENGTHS)] for row in range(size)])
        seen_C = torch.arange(size) * 37 % 150 + lengths_C
        slots = torch.arange(int(seen_C.sum())) * 7 % 311
        tokens, stops_C = int(lengths_C.sum()), lengths_C.cumsum(0)
        plan = torch.cat([torch.tensor([size]), tokens + 1 - stops_C, lengths_C, seen_C.cumsum(0), slots])
        q, out = (random(tokens + 1, heads, width) for _ in range(2))
        caches = [random(311, kv_heads, width) for _ in range(2)]
        return q, *caches, out, plan, heads, kv_heads, width, width**-0.5

    return KernelSpec(source("attention.cpp"), _attend, arguments)


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
        seen, tokens = stop - begin, slice(first, first + length)
        masked_nL = torch.arange(seen) > torch.arange(seen - length, seen)[:, None]
        scores_NnL = torch.einsum("tnd,lnd->ntl", q_TND[tokens].float(), k) * scale
        weights_NnL = scores_NnL.masked_fill(masked_nL, -torch.inf).softmax(-1).to(q_TND.dtype).float()
        out_TND[tokens] = torch.einsum("ntl,lnd->tnd", weights_NnL, v).to(out_TND.dtype)
        begin = stop
