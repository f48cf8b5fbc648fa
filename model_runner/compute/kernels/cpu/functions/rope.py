"""Rotary embedding of q and k with the store of k and v into the cache: the spec and reference of rope.cpp.

Legend: T tokens, N query heads, K key/value heads, J = N + 2 K, D head size, E half of the rotated elements of a head,
M slots of the cache.
"""

from __future__ import annotations

import torch

from model_runner.compute.kernels.cpu.functions.spec import Argument, KernelSpec, RandomTensors, source

SHAPES = ((6, 2, 64, 32), (4, 1, 20, 10), (3, 3, 40, 8), (2, 1, 48, 20))
"""The sizes (N, K, D, E) that the kernel is checked with."""


def rope_and_store(dtype: torch.dtype) -> KernelSpec:
    """Returns the spec of a kernel that writes the rotated q, and stores the rotated k and v at their slots.

    Slots are all different. Results are rounded where torch rounds. The kernel's arguments are
    (qkv [T, J, D], cos, sin [T, 1, E], k and v [M, K, D], slots [T] int64, q [T, N, D], T, N, K, D, E).
    """

    def arguments(size: int) -> tuple[Argument, ...]:
        random, (heads, kv_heads, width, half) = RandomTensors(dtype), SHAPES[size % len(SHAPES)]
        cos, sin = (random(size, 1, half) for _ in range(2))
        caches = [random(2 * size, kv_heads, width) for _ in range(2)]
        qkv, slots = random(size, heads + 2 * kv_heads, width), torch.arange(size).flip(0) * 2
        return qkv, cos, sin, *caches, slots, random(size, heads, width), size, heads, kv_heads, width, half

    return KernelSpec(source("rope.cpp"), _rope_and_store, arguments)


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
    first, second, unrotated = torch.split(qkv_TJD[:, :-kv_heads], [half, half, size - 2 * half], -1)
    rotated = torch.cat((first * cos_T1E - second * sin_T1E, second * cos_T1E + first * sin_T1E, unrotated), -1)
    q_TND.copy_(rotated[:, :heads])
    k_MKD[slots_T] = rotated[:, heads:]
    v_MKD[slots_T] = qkv_TJD[:, -kv_heads:]
