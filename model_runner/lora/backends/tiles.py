"""Cuts a step into tiles, by request or by lane. A tile has at most `rows` rows, all of one lane.

    by request     each chunk of the step is cut by itself            [AAAAAAAA][AAA]  [B]  [A]  [CC]
    by lane        full tiles as above; the remainders of all         [AAAAAAAA]  [AAA A]  [B]  [CC]
                   chunks are grouped by lane

The rows of a tile are adjacent in the step, or are listed in `gather`; then the tile's start is -1 - the index
of the first entry. Rows of lane 0 are in no tile. The work grows with chunks and tiles, not with tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model_runner.step.layout import Layout

Ints = NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Tiles:
    """Where each tile begins, how many rows it has, and its lane; `gather` lists the rows of scattered tiles."""

    starts: Ints
    counts: Ints
    lanes: Ints
    gather: Ints

    def __len__(self) -> int:
        return len(self.starts)


def by_request(layout: Layout, rows: int) -> Tiles:
    """Returns tiles with rows of one chunk each."""
    chosen = np.flatnonzero(layout.lanes_C)
    begins = layout.offsets()[:-1][chosen]
    starts, counts, source = _cut(begins, layout.lengths_C[chosen], rows)
    return Tiles(starts, counts, layout.lanes_C[chosen][source], np.zeros(0, np.int32))


def by_lane(layout: Layout, rows: int) -> Tiles:
    """Returns the full tiles of each chunk, and tiles of the rows that remain of the chunks of each lane."""
    chosen = np.flatnonzero(layout.lanes_C)
    chosen = chosen[np.argsort(layout.lanes_C[chosen], kind="stable")]
    lanes, lengths = layout.lanes_C[chosen], layout.lengths_C[chosen]
    begins = layout.offsets()[:-1][chosen]
    whole = lengths - lengths % rows
    starts, counts, source = _cut(begins, whole, rows)
    gather, more_starts, more_counts, more_lanes = _tile_remainders(begins + whole, lengths - whole, lanes, rows)
    return Tiles(
        np.concatenate([starts, more_starts]),
        np.concatenate([counts, more_counts]),
        np.concatenate([lanes[source], more_lanes]),
        gather,
    )


def _cut(begins: Ints, lengths: Ints, rows: int) -> tuple[Ints, Ints, NDArray[np.intp]]:
    """Cuts runs into pieces of at most `rows`. Returns the start, the count and the run index of each piece."""
    pieces = -(-lengths // rows)
    source = np.repeat(np.arange(len(lengths)), pieces)
    skipped = _within(pieces) * rows
    starts = begins[source] + skipped
    counts = np.minimum(rows, lengths[source] - skipped)
    return starts.astype(np.int32), counts.astype(np.int32), source


def _tile_remainders(begins: Ints, lengths: Ints, lanes: Ints, rows: int) -> tuple[Ints, Ints, Ints, Ints]:
    """Groups short runs by lane. Returns the gathered rows, and the starts, counts and lanes of the tiles."""
    gather = (np.repeat(begins, lengths) + _within(lengths)).astype(np.int32)
    lanes_n = np.repeat(lanes, lengths)
    firsts = np.flatnonzero(np.diff(lanes_n, prepend=0))
    per_lane = np.diff(firsts, append=len(lanes_n)).astype(np.int32)
    at, counts, source = _cut(firsts.astype(np.int32), per_lane, rows)
    first, last = gather[at], gather[at + counts - 1]
    starts = np.where(last - first == counts - 1, first, -1 - at).astype(np.int32)
    return gather, starts, counts, lanes_n[firsts][source].astype(np.int32)


def _within(counts: NDArray[np.integer]) -> NDArray[np.int64]:
    """Returns 0, 1, .., count - 1 for each of `counts`, one after the other."""
    starts = np.cumsum(counts) - counts
    within: NDArray[np.int64] = np.arange(counts.sum()) - np.repeat(starts, counts)
    return within
