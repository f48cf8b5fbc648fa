"""The table of a step's work that the LoRA kernels read: records of eight int32.

    item   a page of a lane, for one tile of its rows      shrink: one program for an item and a split of I
    tile   at most ROWS rows of one lane                   expand: one program for a tile and a block of columns
    slot   a vector slot of a tile's lane

    tiles   | START COUNT FIRST NUMBER FIRST_SLOT SLOTS |        items FIRST .. FIRST + NUMBER are the tile's pages
    items   | START COUNT PAGE ORDER UNITS SCALE |               ORDER 0, 1, .. within the tile
    slots   | - - PAGE - - SCALE |

A tile of consecutive rows has START >= 0, its first row; otherwise START = -1 - i, and its rows are the entries of
`gather` from i on. UNITS packs the numbers of used units of a page, eight bits a slice; it is -1 if they differ between
the sites of the group, and each site has its own table. COUNT 0 ends the list. SCALE is a float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

RECORD = 8
PAGE_RANK = 16

R = tl.constexpr(RECORD)
P16 = tl.constexpr(PAGE_RANK)

START = tl.constexpr(0)
COUNT = tl.constexpr(1)
PAGE = tl.constexpr(2)
ORDER = tl.constexpr(3)
UNITS = tl.constexpr(4)
SCALE = tl.constexpr(5)
FIRST = tl.constexpr(2)
NUMBER = tl.constexpr(3)
FIRST_SLOT = tl.constexpr(4)
SLOTS = tl.constexpr(5)


@triton.jit
def rows_of(record, gather, ROWS: tl.constexpr):
    """Returns [ROWS] int64, the rows of an item or tile, and [ROWS] bool, which of them are not padding."""
    start = tl.load(record + START)
    within = tl.arange(0, ROWS)
    real = within < tl.load(record + COUNT)
    rows = start + within
    if gather is not None:  # noqa: SIM102  (decided when compiling, unlike the next line)
        if start < 0:
            rows = tl.load(gather + (-1 - start) + within, mask=real, other=0)
    return tl.where(real, rows, 0).to(tl.int64), real


@triton.jit
def scale_of(record):
    """Returns the scale of an item or slot as a float32."""
    return tl.load(record + SCALE).to(tl.float32, bitcast=True)
