"""A step's work as the kernels read it: every group's items, tiles and slots in one table of int32.

    | qkv: items .. | tiles .. | slots .. | o: items .. | tiles .. | .. | gathered rows |

An item is a page of a tile, a slot is a vector slot of a tile. The table is exactly as large as the step needs, or, for
static buffers, as large as any step with their number of tokens can need; unused records are zero. Writing it takes
time in proportion to the tiles and their pages. The layout of a record is defined in
model_runner/compute/kernels/triton/lora/segments.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model_runner.compute.kernels.triton.lora.segments import RECORD
from model_runner.lora.backends.lane_tables import GroupLanes
from model_runner.lora.backends.tiles import Tiles
from model_runner.lora.site import vectors_of


@dataclass(frozen=True)
class GroupRange:
    """Where a group's records begin in the table, how many fit, and `width`, the most pages of a lane."""

    items_at: int
    items: int
    tiles_at: int
    tiles: int
    slots_at: int
    slots: int
    width: int


@dataclass(frozen=True)
class TableLayout:
    """The ranges of the groups that have work, where the gathered rows begin, and the size of the table."""

    groups: dict[str, GroupRange]
    gather_at: int
    size: int


def largest_layout(most: Mapping[str, int], tiles: int, rows: int) -> TableLayout:
    """Returns the layout for any step of `tiles` tiles and `rows` gathered rows.

    `most` is the most pages or slots of a lane, by group.
    """
    sizes = {
        group: (tiles * most.get(group, 0), tiles, tiles * most.get(vectors_of(group), 0), most.get(group, 0))
        for group in _groups(most)
    }
    return _lay_out(sizes, rows)


def exact_layout(tiles: Tiles, groups: Mapping[str, GroupLanes]) -> TableLayout:
    """Returns the smallest layout for this step."""
    sizes = {}
    for group in _groups(groups):
        pages_t, slots_t = _counts(tiles, groups, group)
        busy = np.count_nonzero(pages_t + slots_t)
        if busy:
            sizes[group] = (int(pages_t.sum()), int(busy), int(slots_t.sum()), int(pages_t.max()))
    return _lay_out(sizes, len(tiles.gather))


def write(table: NDArray[np.int32], layout: TableLayout, tiles: Tiles, groups: Mapping[str, GroupLanes]) -> None:
    """Writes the step's records; all other records become zero."""
    table[: layout.gather_at] = 0
    table[layout.gather_at : layout.gather_at + len(tiles.gather)] = tiles.gather
    for group, span in layout.groups.items():
        pages_t, slots_t = _counts(tiles, groups, group)
        busy = np.flatnonzero(pages_t + slots_t)
        pages_t, slots_t = pages_t[busy], slots_t[busy]
        rows_tn = np.stack([tiles.starts[busy], tiles.counts[busy]], axis=1)
        lanes_t = tiles.lanes[busy]
        tile = table[span.tiles_at :][: len(busy) * RECORD].reshape(-1, RECORD)
        tile[:, :2], tile[:, 2], tile[:, 3] = rows_tn, np.cumsum(pages_t) - pages_t, pages_t
        tile[:, 4], tile[:, 5] = np.cumsum(slots_t) - slots_t, slots_t
        _write_list(table[span.items_at :], groups.get(group), lanes_t, pages_t, rows_tn)
        _write_list(table[span.slots_at :], groups.get(vectors_of(group)), lanes_t, slots_t, rows_tn)


def _write_list(
    room: NDArray[np.int32],
    lanes: GroupLanes | None,
    lanes_t: NDArray[np.int32],
    counts_t: NDArray[np.int32],
    rows_tn: NDArray[np.int32],
) -> None:
    """Writes a record for each page of each tile, tile after tile."""
    if lanes is None or not len(counts_t):
        return
    tile_w = np.repeat(np.arange(len(counts_t)), counts_t)
    order_w = np.arange(len(tile_w)) - np.repeat(np.cumsum(counts_t) - counts_t, counts_t)
    at = (lanes_t[tile_w], order_w)
    record = room[: len(tile_w) * RECORD].reshape(-1, RECORD)
    record[:, :2], record[:, 3] = rows_tn[tile_w], order_w
    record[:, 2], record[:, 4] = lanes.pages_LK[at], lanes.units_LK[at]
    record[:, 5] = lanes.scales_LK[at].view(np.int32)


def _counts(tiles: Tiles, groups: Mapping[str, GroupLanes], group: str) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Returns how many pages and how many slots each tile has in a group."""
    none = np.zeros(len(tiles), np.int32)
    pages, slots = groups.get(group), groups.get(vectors_of(group))
    return (
        none if pages is None else pages.counts_L[tiles.lanes],
        none if slots is None else slots.counts_L[tiles.lanes],
    )


def _groups(names: Mapping[str, object]) -> list[str]:
    """Returns the groups of sites, given the names of groups of pages and of vector slots."""
    return list(dict.fromkeys(name.removesuffix(vectors_of("")) for name in names))


def _lay_out(sizes: Mapping[str, tuple[int, int, int, int]], rows: int) -> TableLayout:
    ranges, at = {}, 0
    for group, (items, tiles, slots, width) in sizes.items():
        starts = [at, at + items * RECORD, at + (items + tiles) * RECORD]
        at += (items + tiles + slots) * RECORD
        ranges[group] = GroupRange(starts[0], items, starts[1], tiles, starts[2], slots, width)
    return TableLayout(ranges, at, at + rows)
