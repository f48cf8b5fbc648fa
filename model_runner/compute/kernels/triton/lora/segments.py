"""The work of a step as the LoRA kernels read it: records of eight int32 in one table, and how a program finds its own.

    item   a page of a lane, for one tile of its rows      shrink: a program an item and split
    tile   at most ROWS rows of one lane                   expand: a program a tile and block of columns
    slot   a vector slot of a tile's lane

    tiles   | START COUNT FIRST NUMBER FIRST_SLOT SLOTS |        items FIRST .. FIRST + NUMBER are the tile's pages
    items   | START COUNT PAGE ORDER UNITS SCALE |               ORDER 0, 1, .. within the tile
    slots   | - - PAGE - - SCALE |

A tile whose rows follow one another has START >= 0, its first row; else START = -1 - i, and its rows are those from
entry i of `gather` on. UNITS packs the real units of a page, eight bits a slice, and is -1 where the sites of the group
differ: then the site's own table says. COUNT 0 ends the list. SCALE is a float32.
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
    """[ROWS] int64 and [ROWS] bool: the rows of an item or tile, and which of them are real."""
    start = tl.load(record + START)
    within = tl.arange(0, ROWS)
    real = within < tl.load(record + COUNT)
    rows = start + within
    if gather is not None:  # noqa: SIM102  (this is known when compiling, the other is not)
        if start < 0:
            rows = tl.load(gather + (-1 - start) + within, mask=real, other=0)
    return tl.where(real, rows, 0).to(tl.int64), real


@triton.jit
def scale_of(record):
    """The record's scale."""
    return tl.load(record + SCALE).to(tl.float32, bitcast=True)
