"""Block sizes of the LoRA kernels, from shapes alone: pure functions of numbers.

Every combination is a kernel to be compiled, so there are few: of a step only the most rows of a tile (16, or what the
backend's long tiles have) and a rough number of tiles (1, 4, 16, ..) count.

A decode step reads each page once and is bound by bytes and latency: enough programs to fill the device, wide rows. A
prefill is bound by how often it reads x and y: tall tiles. In triton's interpreter a program costs milliseconds
whatever it does: one program for everything. Knows nothing of tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

from model_runner.compute.kernels.triton.lora.segments import PAGE_RANK

INTERPRETED = 0
"""In the stead of the number of multiprocessors: one program for everything."""

SHORT = 16
"""Rows of a tile where every run is short; tensor cores want no fewer."""

MAX_SPLITS = 16
MAX_SUMMED = 8192
"""Numbers that the expand sums over splits at once."""

MIN_SPAN = 256
MAX_PAGES = 4
BLOCK_BYTES = 512
STAGE_BYTES = 32 << 10


@dataclass(frozen=True)
class ShrinkTiling:
    """`rows` x `units` outputs of a program, `block` columns of x and A at a time, `span` blocks in each split."""

    rows: int
    units: int
    block: int
    splits: int
    span: int
    warps: int = 4
    stages: int = 3


@dataclass(frozen=True)
class ExpandTiling:
    """`rows` x `block` outputs of a program; `pages` at a time of lanes that have several.

    `registers` of a thread at most. Left to itself ptxas takes fewer, and spills for the sake of occupancy.
    """

    rows: int
    block: int
    pages: int
    warps: int = 4
    stages: int = 1
    registers: int | None = None


def shrink_tiling(
    rows: int, features: int, slices: int, tiles: int, most_pages: int, itemsize: int, processors: int
) -> ShrinkTiling:
    """For about `tiles` tiles of at most `rows` rows, lanes of `most_pages` pages, a site of `features` inputs."""
    units = PAGE_RANK * power_of_two(slices)
    if processors == INTERPRETED:
        return ShrinkTiling(rows, units, power_of_two(features), 1, 1)
    fits = floor_of_two(STAGE_BYTES // ((rows + units) * itemsize))
    block = min(BLOCK_BYTES // itemsize, fits, max(32, power_of_two(features)))
    wanted = power_of_two(max(1, (2 if rows == SHORT else 1) * processors // busy(tiles, rows)))
    summed = max(1, MAX_SUMMED // (rows * PAGE_RANK * pages_at_once(most_pages)))
    splits = min(MAX_SPLITS, wanted, summed, floor_of_two(max(1, features // MIN_SPAN)))
    span = -(-features // (splits * block))
    return ShrinkTiling(rows, units, block, splits, span)


def expand_tiling(
    rows: int, widest: int, outs: int, tiles: int, most_pages: int, itemsize: int, processors: int
) -> ExpandTiling:
    """For about `tiles` tiles of at most `rows` rows, lanes of `most_pages` pages, a site of `outs` outputs.

    `widest` is the width of its widest slice.
    """
    pages = pages_at_once(most_pages)
    if processors == INTERPRETED:
        return ExpandTiling(rows, max(16, power_of_two(widest)), pages)
    most = (128 if rows == SHORT or (rows < 128 and pages < MAX_PAGES) else 64) * 2 // itemsize
    wanted = floor_of_two(max(1, outs * busy(tiles, rows) // (4 * processors)))
    block = max(64, min(most, wanted))
    if rows * block >= 8192:
        return ExpandTiling(rows, block, pages, warps=8)
    return ExpandTiling(rows, block, pages, registers=255)


def pages_at_once(most_pages: int) -> int:
    """How many pages the expand multiplies at once, where a lane has at most so many."""
    return min(MAX_PAGES, power_of_two(most_pages))


def tile_rows(longest: int, most: int) -> int:
    """Rows of a tile where the longest run has `longest`."""
    return SHORT if longest <= SHORT else most


def busy(tiles: int, rows: int) -> int:
    """The number of tiles, roughly: up to 256 short ones or 64 long ones."""
    return min(256 if rows <= SHORT else 64, 1 << ((tiles.bit_length() - 1) & ~1))


def programs(capacity: int, others: int, processors: int) -> int:
    """How many programs take `capacity` records, with `others` programs for each: idle ones are not free."""
    return capacity if processors == INTERPRETED else max(1, min(capacity, 6 * processors // max(1, others)))


def floor_of_two(number: int) -> int:
    """The greatest power of two that is at most `number`."""
    return 1 << (number.bit_length() - 1)


def power_of_two(number: int) -> int:
    """The least power of two that is at least `number`."""
    return 1 << max(0, number - 1).bit_length()
