"""The LoRA shrink, h = scale * (x A^T), for every page of every lane of a step, in one launch for a site.

    x [T, I] rows of a tile            A of a page, all slices: 16 S units x I, along I
    +--------+--------+--------+       +--------+--------+--------+
    |split 0 |split 1 | ...    |   .   |        |        |        |  ->  h[split, row, order, slice * 16 + unit]
    +--------+--------+--------+       +--------+--------+--------+

A program computes one split of I for one item. The expand sums splits in a fixed order, so that results do not depend
on timing. Unused units are not read, and slices without units are not written. Items are records of the table in
segments.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from model_runner.compute.kernels.triton.lora.segments import COUNT, ORDER, P16, PAGE, UNITS, R, rows_of, scale_of
from model_runner.compute.kernels.triton.lora.tiling import ShrinkTiling


@triton.jit
def _used_units(record, site_units, slices, UNITS_N: tl.constexpr):
    """Returns [UNITS_N]: for each unit, the number of units of its slice that the item's page uses at this site."""
    unit = tl.arange(0, UNITS_N)
    piece = unit // P16
    packed = tl.load(record + UNITS)
    used = (packed >> (piece * 8)) & 255
    if packed < 0:
        page = tl.load(record + PAGE)
        used = tl.load(site_units + page * slices + piece, mask=piece < slices, other=0)
    return tl.where(piece < slices, used, 0)


@triton.jit
def _shrink_item(
    x, a, h, record, gather, site_units, tokens, width, x_stride, features, slices, span,
    ROWS: tl.constexpr, UNITS_N: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    used = _used_units(record, site_units, slices, UNITS_N)
    if tl.max(used, 0) > 0:
        rows, real = rows_of(record, gather, ROWS)
        unit = tl.arange(0, UNITS_N)
        live = unit % P16 < used
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
        offsets = ((split * tokens + rows) * width + order)[:, None] * (slices * P16) + unit[None, :]
        tl.store(h + offsets, acc * scale_of(record), mask=real[:, None] & (used > 0)[None, :])


@triton.jit(do_not_specialize=["items_at", "capacity", "tokens", "width", "slices", "span"])
def shrink_kernel(
    x, a, h, table, gather, site_units,
    items_at, capacity, tokens, width, x_stride, features, slices, span,
    ROWS: tl.constexpr, UNITS_N: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (splits, n): program (s, i) computes split s of the items i, i + n, i + 2 n, ... until the list ends."""
    if PDL:
        gdc_launch_dependents()
    item = tl.program_id(1)
    items = table + items_at
    count = tl.load(items + item * R + COUNT)
    while count > 0:
        next_one = item + tl.num_programs(1)
        count = tl.load(items + next_one * R + COUNT, mask=next_one < capacity, other=0)
        _shrink_item(
            x, a, h, items + item * R, gather, site_units, tokens, width, x_stride, features, slices, span,
            ROWS, UNITS_N, BLOCK,
        )  # fmt: skip
        item = next_one


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
    """Writes to h, a flat float32 [splits, T, width, S * 16], the elements of the items' rows, pages and used units.

    table      int32, flat; up to `capacity` items from `items_at` on
    gather     int32, or None if the rows of every tile are consecutive
    programs   at most `capacity`; with fewer, each takes several items
    width      the most pages of a lane
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
