"""Launches the attention kernels over tiles of queries (see attention.py). Does not depend on layouts.

Legend: T tokens of the batch, N query heads, K key/value heads, D head size, P pages, S page size, n tiles.
"""

from __future__ import annotations

import math

import torch

from model_runner.compute.kernels.triton.attention import MERGE_BLOCK, attend_kernel, merge_kernel
from model_runner.compute.kernels.triton.attention_shapes import WAVES, Shape, padded_head, parts, splits
from model_runner.compute.kernels.triton.target import processors

_UNBOUNDED = 1 << 30  # a window larger than any row


def attend_tiles(
    q_TND: torch.Tensor,
    k_cache_PSKD: torch.Tensor,
    v_cache_PSKD: torch.Tensor,
    out_TND: torch.Tensor,
    tiles_n4: torch.Tensor,
    pages: torch.Tensor,
    total: torch.Tensor,
    shape: Shape,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    spans: int | None = None,
) -> None:
    """Writes the attention of the tiles' queries to `out`, which is contiguous.

    Each tile has at most `shape.queries` queries.

    q may be a slice of a wider tensor: its heads are D apart, its tokens at any stride. Both caches have equal strides.
    `spans`: the number of spans that an average tile's keys are cut into, and the most for any tile; None: chosen for
    the device.
    """
    _check(q_TND, k_cache_PSKD, v_cache_PSKD, out_TND)
    (heads, size), (page_size, kv_heads) = q_TND.shape[1:], k_cache_PSKD.shape[1:3]
    group, count = heads // kv_heads, len(tiles_n4)
    programs = kv_heads * parts(group, shape)
    multiprocessors = processors(q_TND.device)
    most_spans = spans or splits(count, programs, shape, multiprocessors)
    share = max(1, spans * count if spans else WAVES * multiprocessors // programs)
    rows = count * shape.queries if most_spans > 1 else 1
    partial = torch.empty(rows, heads, most_spans, size, dtype=torch.float32, device=q_TND.device)
    lse = torch.empty(rows, heads, most_spans, dtype=torch.float32, device=q_TND.device)
    inner, outer = _factors(scale, softcap)
    seen, padded = window or _UNBOUNDED, padded_head(size)
    attend_kernel[count, programs, most_spans](
        q_TND, k_cache_PSKD, v_cache_PSKD, out_TND, partial, lse, tiles_n4, pages, total,
        q_TND.stride(0), k_cache_PSKD.stride(0), k_cache_PSKD.stride(1), inner, outer, seen, most_spans, share,
        G=group, HEADS=shape.heads, D=size, BLOCK_D=padded, PAGE=page_size,
        QUERIES=shape.queries, BLOCK_M=shape.rows, BLOCK_N=shape.keys,
        WINDOWED=window is not None, CAPPED=softcap is not None,
        num_warps=shape.warps, num_stages=shape.stages,
    )  # fmt: skip
    if most_spans > 1:
        merge_kernel[rows, heads](
            out_TND, partial, lse, tiles_n4, total, seen, most_spans, share, count,
            D=size, BLOCK_D=padded, QUERIES=shape.queries, BLOCK_N=shape.keys, BLOCK_S=MERGE_BLOCK,
            num_warps=4,
        )  # fmt: skip


def _check(q_TND: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, out_TND: torch.Tensor) -> None:
    size = q_TND.shape[2]
    assert q_TND.stride()[1:] == k_cache.stride()[2:] == (size, 1)
    assert k_cache.stride() == v_cache.stride()
    assert out_TND.is_contiguous()


def _factors(scale: float, softcap: float | None) -> tuple[float, float]:
    """Returns the factors of q k^T before and after the softcap. They include log2(e) because the softmax uses exp2."""
    if softcap is None:
        return scale * math.log2(math.e), 0.0
    return scale / softcap, softcap * math.log2(math.e)
