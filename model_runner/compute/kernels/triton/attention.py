"""Paged causal attention: one kernel for decodes and prefills, and one that merges the results of spans.

A tile is some consecutive queries of one row, with all the query heads of one key/value head: the rows of a tile are
(query, head) pairs, so K and V are read once for all of them. A decode is a tile of one query. The keys that a tile
sees are cut into at most `splits` spans, one program each (flash-decoding, 2311.01282); within a span the softmax is
computed online (2205.14135).

    keys of a row  0 ........ first ........................ stop        first: where the window begins, else 0
                                |  span  |  span  |  span  |             stop:  the tile's last query + 1
    tile                            each (m, l, acc) -> partial result, log-sum-exp -> merge

The length of a span is computed on the device from the keys of all tiles, so that captured launches stay balanced for
rows of any length: long rows are cut evenly, short rows are not cut, and programs beyond a row's spans return at once.

Only a row's own pages are read for it, up to its own last position, so rows cannot affect each other.

    tiles     [n, 4] int32: the first query's token in the batch, its position in its row, the number of queries, and
              where the row's pages begin in `pages`; 16 byte aligned
    pages     [...] int32: page numbers, those of a row consecutive
    total     [1] int32: the number of keys that each tile sees, summed over the tiles
    window    the number of keys that a query sees, its own included; without WINDOWED, a number larger than any row
    partial   [n * QUERIES, heads, splits, D] float32 and lse [n * QUERIES, heads, splits]: log-sum-exp, base 2

Legend: G query heads to a key/value head, HEADS of them in a tile (all, unless G is huge), D head size.
"""

from __future__ import annotations

import triton
import triton.language as tl

from model_runner.compute.kernels.triton.activations import tanh

_COUNTS = ["splits", "share", "window"]
MERGE_BLOCK = 16  # spans that the merge reads at once


@triton.jit
def span_of(position, count, total_ptr, tiles, splits, share, window, QUERIES: tl.constexpr, BLOCK_N: tl.constexpr):
    """Returns first and stop of the keys that a tile sees, and the number of keys in one of its spans."""
    first, stop = tl.maximum(position - window + 1, 0), position + count
    total = tl.minimum(tl.load(total_ptr).to(tl.int64), tl.cast(tiles, tl.int64) * (window + QUERIES))
    even_share = tl.cdiv(total, share).to(tl.int32)  # keys of a program if all programs had equal work
    spans = tl.minimum(tl.maximum((stop - first + even_share // 2) // even_share, 1), splits)
    return first, stop, tl.cdiv(tl.cdiv(stop - first, spans), BLOCK_N) * BLOCK_N


@triton.jit
def attend_keys(
    begin, end, q, acc, running_max, norm,
    k_ptr, v_ptr, row_pages_ptr, page_stride, slot_stride,
    position_M, inner, outer, window,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PAGE: tl.constexpr,
    MASKED: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """Adds keys begin..end - 1 to the online softmax. Without MASKED, blocks are full and queries see all keys."""
    offs_n, offs_d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    for start in range(begin, end, BLOCK_N):
        keys = start + offs_n
        if MASKED:
            real = keys < end
            page = tl.load(row_pages_ptr + keys // PAGE, mask=real, other=0)
        else:
            page = tl.load(row_pages_ptr + keys // PAGE)
        starts = page.to(tl.int64) * page_stride + (keys % PAGE) * slot_stride
        offsets = starts[:, None] + offs_d[None, :]
        if MASKED:
            k = tl.load(k_ptr + offsets, mask=real[:, None] & (offs_d < D)[None, :], other=0.0)
        elif D == BLOCK_D:
            k = tl.load(k_ptr + offsets)
        else:
            k = tl.load(k_ptr + offsets, mask=(offs_d < D)[None, :], other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * inner
        if CAPPED:
            scores = outer * tanh(scores)
        if MASKED:
            seen = real[None, :] & (keys[None, :] <= position_M[:, None])
            if WINDOWED:
                seen &= keys[None, :] > position_M[:, None] - window
            scores = tl.where(seen, scores, -float("inf"))
        new_max = tl.maximum(running_max, tl.max(scores, 1))
        safe_max = new_max
        if MASKED:
            safe_max = tl.where(new_max == -float("inf"), 0.0, new_max)  # -inf: the query has seen no key yet
        weights = tl.exp2(scores - safe_max[:, None])
        rescale = tl.exp2(running_max - safe_max)
        running_max = new_max
        norm = norm * rescale + tl.sum(weights, 1)
        if MASKED:
            v = tl.load(v_ptr + offsets, mask=real[:, None] & (offs_d < D)[None, :], other=0.0)
        elif D == BLOCK_D:
            v = tl.load(v_ptr + offsets)
        else:
            v = tl.load(v_ptr + offsets, mask=(offs_d < D)[None, :], other=0.0)
        acc = tl.dot(weights.to(v.dtype), v, acc * rescale[:, None], input_precision="ieee")
    return acc, running_max, norm


@triton.jit(do_not_specialize=_COUNTS)
def attend_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, partial_ptr, lse_ptr, tiles_ptr, pages_ptr, total_ptr,
    q_stride, page_stride, slot_stride, inner, outer, window, splits, share,
    G: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PAGE: tl.constexpr,
    QUERIES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    WINDOWED: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """A program computes one tile, one key/value head (or HEADS of its query heads) and one span of keys.

    Heads of q are D apart.
    """
    tile, part, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    token, position = tl.load(tiles_ptr + tile * 4), tl.load(tiles_ptr + tile * 4 + 1)
    count, first_page = tl.load(tiles_ptr + tile * 4 + 2), tl.load(tiles_ptr + tile * 4 + 3)
    first, stop, span = span_of(position, count, total_ptr, tl.num_programs(0), splits, share, window, QUERIES, BLOCK_N)
    begin = first + split * span
    if begin >= stop:
        return
    end = tl.minimum(begin + span, stop)

    PARTS: tl.constexpr = (G + HEADS - 1) // HEADS
    kv_head = part // PARTS
    heads = tl.num_programs(1) // PARTS * G
    offs_d, offs_m = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_M)
    query, in_group = offs_m // HEADS, part % PARTS * HEADS + offs_m % HEADS
    real = (query < count) & (in_group < G)
    head = kv_head * G + in_group
    mask = real[:, None] & (offs_d < D)[None, :]
    q_rows = (token + query).to(tl.int64) * q_stride + head * D
    q = tl.load(q_ptr + q_rows[:, None] + offs_d[None, :], mask=mask, other=0.0)

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    norm = tl.zeros([BLOCK_M], tl.float32)
    running_max = tl.full([BLOCK_M], -float("inf"), tl.float32)
    unmasked_end = begin
    if QUERIES == 1 or not WINDOWED:  # the first query sees begin..position, later ones more
        unmasked_end = begin + (tl.maximum(tl.minimum(end, position + 1) - begin, 0) // BLOCK_N) * BLOCK_N
        acc, running_max, norm = attend_keys(
            begin, unmasked_end, q, acc, running_max, norm,
            k_ptr + kv_head * D, v_ptr + kv_head * D, pages_ptr + first_page, page_stride, slot_stride,
            position + query, inner, outer, window, D, BLOCK_D, BLOCK_N, PAGE, False, WINDOWED, CAPPED,
        )  # fmt: skip
    acc, running_max, norm = attend_keys(
        unmasked_end, end, q, acc, running_max, norm,
        k_ptr + kv_head * D, v_ptr + kv_head * D, pages_ptr + first_page, page_stride, slot_stride,
        position + query, inner, outer, window, D, BLOCK_D, BLOCK_N, PAGE, True, WINDOWED, CAPPED,
    )  # fmt: skip

    acc = acc / tl.where(norm == 0.0, 1.0, norm)[:, None]
    if span >= stop - first:
        out_rows = (token + query).to(tl.int64) * (heads * D) + head * D
        tl.store(out_ptr + out_rows[:, None] + offs_d[None, :], acc.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        starts = ((tile * QUERIES + query).to(tl.int64) * heads + head) * splits + split
        tl.store(lse_ptr + starts, running_max + tl.log2(tl.where(norm == 0.0, 1.0, norm)), mask=real)
        tl.store(partial_ptr + starts[:, None] * D + offs_d[None, :], acc, mask=mask)


@triton.jit(do_not_specialize=[*_COUNTS, "tiles"])
def merge_kernel(
    out_ptr, partial_ptr, lse_ptr, tiles_ptr, total_ptr, window, splits, share, tiles,
    D: tl.constexpr, BLOCK_D: tl.constexpr, QUERIES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """A program merges the spans of one query and head: their mean, weighted by the sums of their exponentials."""
    row, head, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    tile = row // QUERIES
    query = row % QUERIES
    token, position = tl.load(tiles_ptr + tile * 4), tl.load(tiles_ptr + tile * 4 + 1)
    count = tl.load(tiles_ptr + tile * 4 + 2)
    first, stop, span = span_of(position, count, total_ptr, tiles, splits, share, window, QUERIES, BLOCK_N)
    if (query >= count) | (span >= stop - first):
        return
    spans = tl.cdiv(stop - first, span)
    offs_s, offs_d = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_D], tl.float32)
    norm = tl.zeros([BLOCK_S], tl.float32)
    running_max = -float("inf")
    here = (row.to(tl.int64) * heads + head) * splits
    for start in range(0, spans, BLOCK_S):
        real = start + offs_s < spans
        lse = tl.load(lse_ptr + here + start + offs_s, mask=real, other=-float("inf"))
        new_max = tl.maximum(running_max, tl.max(lse, 0))
        safe_max = tl.where(new_max == -float("inf"), 0.0, new_max)
        weights = tl.exp2(lse - safe_max)
        rescale = tl.exp2(running_max - safe_max)
        running_max = new_max
        offsets = (here + start + offs_s)[:, None] * D + offs_d[None, :]
        parts = tl.load(partial_ptr + offsets, mask=real[:, None] & (offs_d < D)[None, :], other=0.0)
        acc = acc * rescale + tl.sum(weights[:, None] * parts, 0)
        norm = norm * rescale + weights
    out = acc / tl.sum(norm, 0)
    place = ((token + query).to(tl.int64) * heads + head) * D
    tl.store(out_ptr + place + offs_d, out.to(out_ptr.dtype.element_ty), mask=offs_d < D)
