"""The LoRA expand, y += h B over a lane's pages, with gains and biases in the same store; one launch for a site.

    y [T, O]      | slice 0             | slice 1    | slice 2    |        B of a page [16, O], along O
                  | block | block | bl. | block | b. | block | b. |        a block is within one slice

A program computes one block of columns of one tile. It sums in float32 and stores once:

    y + sum over pages (h B) + sum over vector slots scale * (gain_less_one * (y - base bias) + bias)

For the embedding, h is looked up in A, where the 16 units of a token are consecutive. With programmatic dependent
launch B is read before the shrink has ended. Tiles, items and slots are records of the table in segments.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from model_runner.compute.kernels.triton.lora.segments import (
    COUNT,
    FIRST,
    FIRST_SLOT,
    NUMBER,
    P16,
    PAGE,
    SCALE,
    SLOTS,
    UNITS,
    R,
    rows_of,
    scale_of,
)
from model_runner.compute.kernels.triton.lora.tiling import ExpandTiling

MAX_SLICES = 3


@triton.jit
def _columns(block, second, third, outs, BLOCK: tl.constexpr):
    """Returns the slice of this block of columns, the columns [BLOCK], and which of them are inside the slice."""
    in_first = tl.cdiv(second, BLOCK)
    in_second = tl.cdiv(third - second, BLOCK)
    piece, begin, stop, index = 0, 0, second, block
    if block >= in_first + in_second:
        piece, begin, stop, index = 2, third, outs, block - in_first - in_second
    elif block >= in_first:
        piece, begin, stop, index = 1, second, third, block - in_first
    cols = begin + index * BLOCK + tl.arange(0, BLOCK)
    return piece, cols, cols < stop


@triton.jit
def _pages_of_b(b, items, site_units, at, number, piece, slices, cols, inside, outs, PAGES: tl.constexpr):
    """Returns B [16 PAGES, BLOCK] of PAGES pages from `at` on, and for each row of B the number of used units of its
    page. Unused units are not read.
    """
    unit = tl.arange(0, PAGES * P16)
    which = at
    if PAGES > 1:  # a scalar suffices for one page
        which = at + unit // P16
    records = items + which * R
    here = which < number
    page = tl.load(records + PAGE, mask=here, other=0)
    packed = tl.load(records + UNITS, mask=here, other=0)
    used = tl.load(site_units + page * slices + piece, mask=packed < 0, other=0)
    used = tl.where(packed < 0, used, (packed >> (piece * 8)) & 255) + tl.zeros((PAGES * P16,), dtype=tl.int32)
    offsets = b + (page.to(tl.int64) * P16 + unit % P16)[:, None] * outs + cols[None, :]
    return tl.load(offsets, mask=(unit % P16 < used)[:, None] & inside[None, :], other=0.0), used


@triton.jit
def _sum_of_splits(
    h, rows, real, used, at, piece, tokens, width, slices,
    ROWS: tl.constexpr, PAGES: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Returns [ROWS, 16 PAGES] float32: the shrink's h for the pages from `at` on, summed over splits."""
    unit = tl.arange(0, PAGES * P16)
    within = ((at + unit // P16) * slices + piece) * P16 + unit % P16
    offsets = h + (rows * width * slices * P16)[:, None] + within[None, :]
    mask = real[:, None] & (used > 0)[None, :]
    total = tl.zeros((ROWS, PAGES * P16), dtype=tl.float32)
    ONCE: tl.constexpr = min(SPLITS, 4)
    for first in tl.static_range(0, SPLITS, ONCE):
        splits = ((first + tl.arange(0, ONCE)).to(tl.int64) * tokens * width * slices * P16)[:, None, None]
        total += tl.sum(tl.load(offsets[None, :, :] + splits, mask=mask[None, :, :], other=0.0), 0)
    return total


@triton.jit
def _look_up(a, token_ids, items, rows, real, used, at, vocabulary, PAGES: tl.constexpr):
    """Returns [ROWS, 16 PAGES] float32: h of the rows' tokens, looked up in A and scaled."""
    unit = tl.arange(0, PAGES * P16)
    records = items + (at + unit // P16) * R
    page = tl.load(records + PAGE, mask=used > 0, other=0).to(tl.int64)
    scale = tl.load(records + SCALE, mask=used > 0, other=0).to(tl.float32, bitcast=True)
    tokens = tl.load(token_ids + rows, mask=real, other=0).to(tl.int64)
    offsets = (page[None, :] * vocabulary + tokens[:, None]) * P16 + (unit % P16)[None, :]
    values = tl.load(a + offsets, mask=real[:, None] & (used > 0)[None, :], other=0.0)
    return values.to(tl.float32) * scale[None, :]


@triton.jit
def _add_pages(
    acc, h, a, b, token_ids, items, site_units, number, rows, real, piece, cols, inside,
    tokens, width, slices, outs, vocabulary,
    ROWS: tl.constexpr, PAGES: tl.constexpr, SPLITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Returns acc + h B over the tile's pages, PAGES at a time. Loads the first pages before the shrink has ended."""
    b_tile, used = _pages_of_b(b, items, site_units, 0, number, piece, slices, cols, inside, outs, PAGES)
    if PDL:
        gdc_wait()
    for at in range(0, number, PAGES):
        if token_ids is not None:
            h_tile = _look_up(a, token_ids, items, rows, real, used, at, vocabulary, PAGES)
        else:
            h_tile = _sum_of_splits(h, rows, real, used, at, piece, tokens, width, slices, ROWS, PAGES, SPLITS)
        acc = tl.dot(h_tile.to(b_tile.dtype), b_tile, acc, input_precision="ieee")
        b_tile, used = _pages_of_b(b, items, site_units, at + PAGES, number, piece, slices, cols, inside, outs, PAGES)
    return acc


@triton.jit
def _add_vectors(acc, base, gain, bias, base_bias, slots, first, number, cols, inside, outs):
    """Returns acc + scale * (gain_less_one * (base - base bias) + bias), summed over the tile's vector slots."""
    if base_bias is not None:
        base -= tl.load(base_bias + cols, mask=inside, other=0.0).to(tl.float32)[None, :]
    for index in range(number):
        record = slots + (first + index) * R
        offsets = tl.load(record + PAGE).to(tl.int64) * outs + cols
        gains = tl.load(gain + offsets, mask=inside, other=0.0)[None, :]
        biases = tl.load(bias + offsets, mask=inside, other=0.0)[None, :]
        acc += scale_of(record) * (gains * base + biases)
    return acc


@triton.jit
def _expand_tile(
    y, h, a, b, token_ids, gain, bias, base_bias, tile, items, slots, gather, site_units,
    tokens, width, slices, second, third, outs, vocabulary,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, PAGES: tl.constexpr, SPLITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    piece, cols, inside = _columns(tl.program_id(0), second, third, outs, BLOCK)
    rows, real = rows_of(tile, gather, ROWS)
    offsets = y + rows[:, None] * outs + cols[None, :]
    here = real[:, None] & inside[None, :]
    base = tl.load(offsets, mask=here, other=0.0).to(tl.float32)
    acc = base
    if b is not None:
        own, number = items + tl.load(tile + FIRST) * R, tl.load(tile + NUMBER)
        if number <= 1:
            acc = _add_pages(
                acc, h, a, b, token_ids, own, site_units, number, rows, real, piece, cols, inside,
                tokens, width, slices, outs, vocabulary, ROWS, 1, SPLITS, PDL,
            )  # fmt: skip
        else:
            acc = _add_pages(
                acc, h, a, b, token_ids, own, site_units, number, rows, real, piece, cols, inside,
                tokens, width, slices, outs, vocabulary, ROWS, PAGES, SPLITS, PDL,
            )  # fmt: skip
    if gain is not None:
        first, number = tl.load(tile + FIRST_SLOT), tl.load(tile + SLOTS)
        acc = _add_vectors(acc, base, gain, bias, base_bias, slots, first, number, cols, inside, outs)
    tl.store(offsets, acc.to(y.dtype.element_ty), mask=here)


@triton.jit(
    do_not_specialize=["items_at", "tiles_at", "slots_at", "capacity", "tokens", "width", "slices", "vocabulary"]
)
def expand_kernel(
    y, h, a, b, token_ids, gain, bias, base_bias, table, gather, site_units,
    items_at, tiles_at, slots_at, capacity, tokens, width, slices, second, third, outs, vocabulary,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, PAGES: tl.constexpr, SPLITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of columns, n): program (b, i) computes block b of tiles i, i + n, ... until the list ends."""
    tile = tl.program_id(1)
    tiles = table + tiles_at
    count = tl.load(tiles + tile * R + COUNT)
    while count > 0:
        next_one = tile + tl.num_programs(1)
        count = tl.load(tiles + next_one * R + COUNT, mask=next_one < capacity, other=0)
        _expand_tile(
            y, h, a, b, token_ids, gain, bias, base_bias,
            tiles + tile * R, table + items_at, table + slots_at, gather, site_units,
            tokens, width, slices, second, third, outs, vocabulary, ROWS, BLOCK, PAGES, SPLITS, PDL,
        )  # fmt: skip
        tile = next_one
    if PDL:
        gdc_wait()  # so that the shrink has ended too when this kernel has


@dataclass(frozen=True, eq=False)
class Vectors:
    """The vector slots of a site, [V, O] float32 each, and the base's bias [O] or None, which gains do not scale."""

    gain_VO: torch.Tensor
    bias_VO: torch.Tensor
    base_bias_O: torch.Tensor | None


def expand(
    y_TO: torch.Tensor,
    h: torch.Tensor | None,
    b_PRO: torch.Tensor | None,
    table: torch.Tensor,
    gather: torch.Tensor | None,
    site_units_PS: torch.Tensor | None,
    *,
    stops: tuple[int, ...],
    items_at: int,
    tiles_at: int,
    slots_at: int,
    capacity: int,
    programs: int,
    width: int,
    splits: int,
    tiling: ExpandTiling,
    vectors: Vectors | None = None,
    embedding: tuple[torch.Tensor, torch.Tensor] | None = None,
    pdl: bool = False,
) -> None:
    """Adds h [splits, T, width, S * 16] times B, and gains and biases, to y in place. y must be contiguous.

    stops      where each slice's columns end, the last one at O
    embedding  (A [P, 1, vocabulary, 16], token ids [T] int64), in place of h
    The other arguments are those of `shrink.shrink`; `capacity` and `programs` count tiles.
    """
    assert y_TO.is_contiguous()
    assert len(stops) <= MAX_SLICES, f"{len(stops)} slices"
    second, third = stops[0], stops[min(1, len(stops) - 1)]
    a, token_ids = embedding or (None, None)
    gain, bias, base_bias = (vectors.gain_VO, vectors.bias_VO, vectors.base_bias_O) if vectors else (None, None, None)
    blocks = sum(-(-(stop - start) // tiling.block) for start, stop in zip((0, *stops), stops, strict=False))
    options = {"launch_pdl": True} if pdl else {}
    expand_kernel[(blocks, programs)](
        y_TO, h, a, b_PRO, token_ids, gain, bias, base_bias, table, gather, site_units_PS,
        items_at, tiles_at, slots_at, capacity, y_TO.shape[0], width, len(stops), second, third, y_TO.shape[1],
        0 if a is None else a.shape[2],
        ROWS=tiling.rows, BLOCK=tiling.block, PAGES=tiling.pages, SPLITS=splits, PDL=pdl,
        num_warps=tiling.warps, num_stages=tiling.stages, maxnreg=tiling.registers, **options,
    )  # fmt: skip
