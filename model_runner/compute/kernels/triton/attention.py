"""Paged causal attention: one kernel for decodes and prefills, and one that merges what splits of it left.

A tile is some queries of one row that stand side by side, with all the query heads of one key/value head: its rows
are (query, head) pairs, so K and V are read once for all of them. A decode is a tile of one query. The keys that a
tile sees are cut into at most `splits` spans, each a program of its own (flash-decoding, 2311.01282); within a span
the softmax is computed online (2205.14135).

    keys of a row  0 ........ first ........................ stop        first: where the window begins, else 0
                                |  span  |  span  |  span  |             stop:  the tile's last query + 1
    tile                            each (m, l, acc) -> out of its own, log-sum-exp -> merge

How long a span is, is computed on the device from the keys of all tiles together, so that captured launches stay
balanced whatever lengths come: long rows are cut evenly, short ones are not, and programs beyond a row's spans leave
at once.

Nothing is read for a row but its own pages, up to its own last position, so nothing reaches it from elsewhere.

    tiles     [n, 4] int32: the first query's place in the batch, its position in its row, queries, and where the
              row's pages begin in `pages`; 16 byte aligned
    pages     [...] int32: page numbers, a row's side by side
    total     [1] int32: keys that all tiles see together
    window    what each query sees of the past with itself; without WINDOWED, more than there can be
    partial   [n * QUERIES, heads, splits, D] float32 and lse [n * QUERIES, heads, splits]: log-sum-exp, base 2

Legend: G query heads to a key/value head, HEADS of them in a tile (all, unless G is huge), D head size.
"""

from __future__ import annotations

import triton
import triton.language as tl

from model_runner.compute.kernels.triton.activations import tanh

_COUNTS = ["splits", "share", "window"]
MERGED = 16  # splits that the merge reads at once


@triton.jit
def span_of(position, count, total_ptr, tiles, splits, share, window, QUERIES: tl.constexpr, BLOCK_N: tl.constexpr):
    """first and stop of the keys that a tile sees, and how many of them a program takes."""
    first, stop = tl.maximum(position - window + 1, 0), position + count
    total = tl.minimum(tl.load(total_ptr).to(tl.int64), tl.cast(tiles, tl.int64) * (window + QUERIES))
    fair = tl.cdiv(total, share).to(tl.int32)  # what every program of a full device would take
    spans = tl.minimum(tl.maximum((stop - first + fair // 2) // fair, 1), splits)
    return first, stop, tl.cdiv(tl.cdiv(stop - first, spans), BLOCK_N) * BLOCK_N


@triton.jit
def attend_keys(
    begin, end, q, acc, best, norm,
    k_ptr, v_ptr, row_pages_ptr, page_stride, slot_stride,
    position_M, inner, outer, window,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PAGE: tl.constexpr,
    MASKED: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """Takes keys begin..end - 1 into the running softmax. Without MASKED every query sees every key of whole blocks."""
    offs_n, offs_d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    for start in range(begin, end, BLOCK_N):
        keys = start + offs_n
        if MASKED:
            real = keys < end
            page = tl.load(row_pages_ptr + keys // PAGE, mask=real, other=0)
        else:
            page = tl.load(row_pages_ptr + keys // PAGE)
        places = page.to(tl.int64) * page_stride + (keys % PAGE) * slot_stride
        spots = places[:, None] + offs_d[None, :]
        if MASKED:
            k = tl.load(k_ptr + spots, mask=real[:, None] & (offs_d < D)[None, :], other=0.0)
        elif D == BLOCK_D:
            k = tl.load(k_ptr + spots)
        else:
            k = tl.load(k_ptr + spots, mask=(offs_d < D)[None, :], other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * inner
        if CAPPED:
            scores = outer * tanh(scores)
        if MASKED:
            seen = real[None, :] & (keys[None, :] <= position_M[:, None])
            if WINDOWED:
                seen &= keys[None, :] > position_M[:, None] - window
            scores = tl.where(seen, scores, -float("inf"))
        higher = tl.maximum(best, tl.max(scores, 1))
        ground = higher
        if MASKED:
            ground = tl.where(higher == -float("inf"), 0.0, higher)  # a query that has seen nothing yet
        weights = tl.exp2(scores - ground[:, None])
        fade = tl.exp2(best - ground)
        best = higher
        norm = norm * fade + tl.sum(weights, 1)
        if MASKED:
            v = tl.load(v_ptr + spots, mask=real[:, None] & (offs_d < D)[None, :], other=0.0)
        elif D == BLOCK_D:
            v = tl.load(v_ptr + spots)
        else:
            v = tl.load(v_ptr + spots, mask=(offs_d < D)[None, :], other=0.0)
        acc = tl.dot(weights.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
    return acc, best, norm


@triton.jit(do_not_specialize=_COUNTS)
def attend_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, partial_ptr, lse_ptr, tiles_ptr, pages_ptr, total_ptr,
    q_stride, page_stride, slot_stride, inner, outer, window, splits, share,
    G: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PAGE: tl.constexpr,
    QUERIES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    WINDOWED: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """One tile, one key/value head (or HEADS of its query heads), one span of keys. q's head rows lie D apart."""
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
    best = tl.full([BLOCK_M], -float("inf"), tl.float32)
    whole = begin
    if QUERIES == 1 or not WINDOWED:  # the first query sees begin..position, and the others no less
        whole = begin + (tl.maximum(tl.minimum(end, position + 1) - begin, 0) // BLOCK_N) * BLOCK_N
        acc, best, norm = attend_keys(
            begin, whole, q, acc, best, norm,
            k_ptr + kv_head * D, v_ptr + kv_head * D, pages_ptr + first_page, page_stride, slot_stride,
            position + query, inner, outer, window, D, BLOCK_D, BLOCK_N, PAGE, False, WINDOWED, CAPPED,
        )  # fmt: skip
    acc, best, norm = attend_keys(
        whole, end, q, acc, best, norm,
        k_ptr + kv_head * D, v_ptr + kv_head * D, pages_ptr + first_page, page_stride, slot_stride,
        position + query, inner, outer, window, D, BLOCK_D, BLOCK_N, PAGE, True, WINDOWED, CAPPED,
    )  # fmt: skip

    acc = acc / tl.where(norm == 0.0, 1.0, norm)[:, None]
    if span >= stop - first:
        out_rows = (token + query).to(tl.int64) * (heads * D) + head * D
        tl.store(out_ptr + out_rows[:, None] + offs_d[None, :], acc.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        places = ((tile * QUERIES + query).to(tl.int64) * heads + head) * splits + split
        tl.store(lse_ptr + places, best + tl.log2(tl.where(norm == 0.0, 1.0, norm)), mask=real)
        tl.store(partial_ptr + places[:, None] * D + offs_d[None, :], acc, mask=mask)


@triton.jit(do_not_specialize=[*_COUNTS, "tiles"])
def merge_kernel(
    out_ptr, partial_ptr, lse_ptr, tiles_ptr, total_ptr, window, splits, share, tiles,
    D: tl.constexpr, BLOCK_D: tl.constexpr, QUERIES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One query and head: the mean of its spans' answers, weighted by the sums of their exponentials."""
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
    best = -float("inf")
    here = (row.to(tl.int64) * heads + head) * splits
    for start in range(0, spans, BLOCK_S):
        real = start + offs_s < spans
        lse = tl.load(lse_ptr + here + start + offs_s, mask=real, other=-float("inf"))
        higher = tl.maximum(best, tl.max(lse, 0))
        ground = tl.where(higher == -float("inf"), 0.0, higher)
        weights = tl.exp2(lse - ground)
        fade = tl.exp2(best - ground)
        best = higher
        spots = (here + start + offs_s)[:, None] * D + offs_d[None, :]
        parts = tl.load(partial_ptr + spots, mask=real[:, None] & (offs_d < D)[None, :], other=0.0)
        acc = acc * fade + tl.sum(weights[:, None] * parts, 0)
        norm = norm * fade + weights
    out = acc / tl.sum(norm, 0)
    place = ((token + query).to(tl.int64) * heads + head) * D
    tl.store(out_ptr + place + offs_d, out.to(out_ptr.dtype.element_ty), mask=offs_d < D)
