"""The block sizes of the LoRA kernels, chosen from shapes by pure functions of numbers.

Each combination of sizes is a kernel that must be compiled. To keep combinations few, sizes depend on a step only
through the rows of a tile (16, or the backend's long tiles) and a rounded number of tiles (1, 4, 16, ..).

A decode step reads each page once and is bound by bytes and latency, so there are enough programs to fill the device,
and blocks are wide. A prefill is bound by how often it reads x and y, so tiles have many rows. In triton's interpreter
every program costs milliseconds, so one program does everything.
"""

from __future__ import annotations

from dataclasses import dataclass

from model_runner.compute.kernels.triton.lora.segments import PAGE_RANK

INTERPRETED = 0
"""The value of `processors` for triton's interpreter, in which one program does everything."""

SHORT = 16
"""The rows of a tile if all runs of rows are short; the fewest rows that tensor cores multiply."""

MAX_SPLITS = 16
MAX_SUMMED = 8192
"""The most elements of h that the expand sums over splits at once."""

MIN_SPAN = 256
MAX_PAGES = 4
BLOCK_BYTES = 512
STAGE_BYTES = 32 << 10


@dataclass(frozen=True)
class ShrinkTiling:
    """The shrink's tiling. A program computes `rows` x `units` outputs from `block` columns of x and A at a time; a
    split has `span` blocks.
    """

    rows: int
    units: int
    block: int
    splits: int
    span: int
    warps: int = 4
    stages: int = 3


@dataclass(frozen=True)
class ExpandTiling:
    """The expand's tiling. A program computes `rows` x `block` outputs, from `pages` pages at a time if the lane has
    several.

    `registers`: the most registers of a thread; None: ptxas chooses, and may spill registers for higher occupancy.
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
    """Returns the shrink's tiling for about `tiles` tiles of at most `rows` rows, lanes of at most `most_pages` pages,
    and a site of `features` in features.
    """
    units = PAGE_RANK * power_of_two(slices)
    if processors == INTERPRETED:
        return ShrinkTiling(rows, units, power_of_two(features), 1, 1)
    fits = floor_of_two(STAGE_BYTES // ((rows + units) * itemsize))
    block = min(BLOCK_BYTES // itemsize, fits, max(32, power_of_two(features)))
    wanted = power_of_two(max(1, (2 if rows == SHORT else 1) * processors // rounded_tiles(tiles, rows)))
    summed = max(1, MAX_SUMMED // (rows * PAGE_RANK * pages_at_once(most_pages)))
    splits = min(MAX_SPLITS, wanted, summed, floor_of_two(max(1, features // MIN_SPAN)))
    span = -(-features // (splits * block))
    return ShrinkTiling(rows, units, block, splits, span)


def expand_tiling(
    rows: int, widest: int, outs: int, tiles: int, most_pages: int, itemsize: int, processors: int
) -> ExpandTiling:
    """Returns the expand's tiling for about `tiles` tiles of at most `rows` rows, lanes of at most `most_pages` pages,
    and a site of `outs` out features, whose widest slice has `widest`.
    """
    pages = pages_at_once(most_pages)
    if processors == INTERPRETED:
        return ExpandTiling(rows, max(16, power_of_two(widest)), pages)
    most = (128 if rows == SHORT or (rows < 128 and pages < MAX_PAGES) else 64) * 2 // itemsize
    wanted = floor_of_two(max(1, outs * rounded_tiles(tiles, rows) // (4 * processors)))
    block = max(64, min(most, wanted))
    if rows * block >= 8192:
        return ExpandTiling(rows, block, pages, warps=8)
    return ExpandTiling(rows, block, pages, registers=255)


def pages_at_once(most_pages: int) -> int:
    """Returns the number of pages that the expand multiplies at once, if lanes have at most `most_pages` pages."""
    return min(MAX_PAGES, power_of_two(most_pages))


def tile_rows(longest: int, most: int) -> int:
    """Returns the rows of a tile if the longest run of rows is `longest`: SHORT if that suffices, else `most`."""
    return SHORT if longest <= SHORT else most


def rounded_tiles(tiles: int, rows: int) -> int:
    """Returns the number of tiles rounded down to a power of four, at most 256 for short tiles and 64 for long ones."""
    return min(256 if rows <= SHORT else 64, 1 << ((tiles.bit_length() - 1) & ~1))


def programs(capacity: int, others: int, processors: int) -> int:
    """Returns the number of programs for `capacity` records if each needs `others` programs: not always `capacity`,
    because programs without work cost time too.
    """
    return capacity if processors == INTERPRETED else max(1, min(capacity, 6 * processors // max(1, others)))


def floor_of_two(number: int) -> int:
    """Returns the greatest power of two that is at most `number`."""
    return 1 << (number.bit_length() - 1)


def power_of_two(number: int) -> int:
    """Returns the least power of two that is at least `number`."""
    return 1 << max(0, number - 1).bit_length()
