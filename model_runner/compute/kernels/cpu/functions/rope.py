"""What stands between qkv and attention, to be compiled from rope.cpp: heads turned, K and V put into their slots.

Legend: T tokens, N query heads, K key/value heads, J = N + 2 K, D head size, E half of what is turned of a head, M
slots of the cache.
"""

from __future__ import annotations

import torch

from model_runner.compute.kernels.cpu.functions.program import Argument, Draw, Program, source

SHAPES = ((6, 2, 64, 32), (4, 1, 20, 10), (3, 3, 40, 8), (2, 1, 48, 20))
"""N, K, D, E."""


def rope_and_store(dtype: torch.dtype) -> Program:
    """(qkv [T, J, D], cos, sin [T, 1, E], k and v [M, K, D], slots [T] int64, q [T, N, D], T, N, K, D, E): writes q
    turned; k turned and v go to their slots, which are distinct. Rounded where torch rounds.
    """

    def arguments(size: int) -> tuple[Argument, ...]:
        draw, (heads, kv_heads, width, half) = Draw(dtype), SHAPES[size % len(SHAPES)]
        cos, sin = (draw(size, 1, half) for _ in range(2))
        caches = [draw(2 * size, kv_heads, width) for _ in range(2)]
        qkv, slots = draw(size, heads + 2 * kv_heads, width), torch.arange(size).flip(0) * 2
        return qkv, cos, sin, *caches, slots, draw(size, heads, width), size, heads, kv_heads, width, half

    return Program(source("rope.cpp"), _rope_and_store, arguments)


def _rope_and_store(
    qkv_TJD: torch.Tensor,
    cos_T1E: torch.Tensor,
    sin_T1E: torch.Tensor,
    k_MKD: torch.Tensor,
    v_MKD: torch.Tensor,
    slots_T: torch.Tensor,
    q_TND: torch.Tensor,
    tokens: int,
    heads: int,
    kv_heads: int,
    size: int,
    half: int,
) -> None:
    first, second, still = torch.split(qkv_TJD[:, :-kv_heads], [half, half, size - 2 * half], -1)
    turned = torch.cat((first * cos_T1E - second * sin_T1E, second * cos_T1E + first * sin_T1E, still), -1)
    q_TND.copy_(turned[:, :heads])
    k_MKD[slots_T] = turned[:, heads:]
    v_MKD[slots_T] = qkv_TJD[:, -kv_heads:]
