"""The shrink of LoRA: h = scale * (x A^T), for every page of every lane of a step, in one launch a site.

    x [T, I] rows of a tile            A of a page, all slices: 16 S units x I, along I
    +--------+--------+--------+       +--------+--------+--------+
    |split 0 |split 1 | ...    |   .   |        |        |        |  ->  h[split, row, order, slice * 16 + unit]
    +--------+--------+--------+       +--------+--------+--------+

A program is an item and a split of I. Splits are summed by the expand, in order, so that answers do not depend on
timing. Units that are not real are not read, and slices without any are not written. Knows nothing of lanes: see
lora_segments.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from model_runner.compute.kernels.triton.lora.segments import COUNT, ORDER, P16, PAGE, UNITS, R, rows_of, scale_of
from model_runner.compute.kernels.triton.lora.tiling import ShrinkTiling


@triton.jit
def _held_units(record, site_units, slices, UNITS_N: tl.constexpr):
    """[UNITS_N]: how many units of its slice are real in the item's page at this site."""
    unit = tl.arange(0, UNITS_N)
    piece = unit // P16
    packed = tl.load(record + UNITS)
    held = (packed >> (piece * 8)) & 255
    if packed < 0:
        page = tl.load(record + PAGE)
        held = tl.load(site_units + page * slices + piece, mask=piece < slices, other=0)
    return tl.where(piece < slices, held, 0)


@triton.jit
def _shrink_item(
    x, a, h, record, gather, site_units, tokens, width, x_stride, features, slices, span,
    ROWS: tl.constexpr, UNITS_N: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    held = _held_units(record, site_units, slices, UNITS_N)
    if tl.max(held, 0) > 0:
        rows, real = rows_of(record, gather, ROWS)
        unit = tl.arange(0, UNITS_N)
        live = unit % P16 < held
        page = tl.load(record + PAGE).to(tl.int64)
        split = tl.program_id(0)
        x_rows = x + rows[:, None] * x_stride
        a_rows = a + (page * slices * P16 + unit)[:, None] * features
        acc = tl.zeros((ROWS, UNITS_N), dtype=tl.float32)
        last = min(split * span + span, tl.cdiv(features, BLOCK))
        for block in range(split * span, last):
            cols = (block * BLOCK + tl.arange(0, BLOCK))[None, :]
            x_tile = tl.load(x_rows + cols, mask=real[:, None] & (cols < features), other=0.0)
            a_tile = tl.load(a_rows + cols, mask=live[:, None] & (cols < features), other=0.0)
            acc = tl.dot(x_tile.to(a_tile.dtype), tl.trans(a_tile), acc, input_precision="ieee")
        order = tl.load(record + ORDER)
        places = ((split * tokens + rows) * width + order)[:, None] * (slices * P16) + unit[None, :]
        tl.store(h + places, acc * scale_of(record), mask=real[:, None] & (held > 0)[None, :])


@triton.jit(do_not_specialize=["items_at", "capacity", "tokens", "width", "slices", "span"])
def shrink_kernel(
    x, a, h, table, gather, site_units,
    items_at, capacity, tokens, width, x_stride, features, slices, span,
    ROWS: tl.constexpr, UNITS_N: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Programs (splits, any number): each takes every so-many-th item until the list ends."""
    if PDL:
        gdc_launch_dependents()
    item = tl.program_id(1)
    items = table + items_at
    count = tl.load(items + item * R + COUNT)
    while count > 0:
        following = item + tl.num_programs(1)
        count = tl.load(items + following * R + COUNT, mask=following < capacity, other=0)
        _shrink_item(
            x, a, h, items + item * R, gather, site_units, tokens, width, x_stride, features, slices, span,
            ROWS, UNITS_N, BLOCK,
        )  # fmt: skip
        item = following


def shrink(
    x_TI: torch.Tensor,
    a_PSRI: torch.Tensor,
    h: torch.Tensor,
    table: torch.Tensor,
    gather: torch.Tensor | None,
    site_units_PS: torch.Tensor,
    *,
    items_at: int,
    capacity: int,
    programs: int,
    width: int,
    tiling: ShrinkTiling,
    pdl: bool = False,
) -> None:
    """Writes h, float32 [splits, T, width, S * 16] flat, where an item's rows, pages and units are; nothing else.

    table      int32, flat; the items begin at `items_at` and there is room for `capacity` of them
    gather     int32, or None where every tile's rows follow one another
    programs   at most `capacity`; fewer programs take several items each
    width      pages of the lane that has most
    pdl        the expand may be launched with programmatic dependent launch
    """
    assert x_TI.stride(1) == 1
    slices, features = a_PSRI.shape[1], a_PSRI.shape[3]
    shrink_kernel[(tiling.splits, programs)](
        x_TI, a_PSRI, h, table, gather, site_units_PS,
        items_at, capacity, x_TI.shape[0], width, x_TI.stride(0), features, slices, tiling.span,
        ROWS=tiling.rows, UNITS_N=tiling.units, BLOCK=tiling.block, PDL=pdl,
        num_warps=tiling.warps, num_stages=tiling.stages,
    )  # fmt: skip
