"""Packs a step's layout into one int32 buffer for the attention kernels, on the host and with numpy only.

    header 4 | decode tiles 4 * C | slots T, padded to 4 | pages of the first chunk, of the second, ...
    ^ the number of keys that each decode tile sees, summed over the tiles

Each part begins at a multiple of 16 bytes, because triton compiles another kernel for pointers of another alignment.

Legend: T tokens of the step, C chunks of length 1 (decodes), L longer chunks (prefills), n tiles. A tile is (index of
its first token in the batch, that token's position in its row, number of queries, index of its row's first page in the
part of the pages); see kernels/triton/attention.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model_runner.step.layout import Ints, Layout

HEADER = 4
_INT32_MAX = np.iinfo(np.int32).max


@dataclass(frozen=True)
class BufferLayout:
    """The offsets of a buffer's parts, for `decodes` chunks of length 1 and `tokens` tokens in all chunks."""

    decodes: int
    tokens: int

    @property
    def slots(self) -> int:
        """The offset of the slots, which follow the decode tiles."""
        return HEADER + 4 * self.decodes

    @property
    def pages(self) -> int:
        """The offset of the page numbers, the last part, which may have any length."""
        return self.slots + -(-self.tokens // 4) * 4


class PackedLayout:
    """A step's layout as tiles. `write` packs it into a buffer of `size` numbers, whose parts `parts` describes.

    prefills_L4   the longer chunks, each as one tile, to be cut into smaller ones by `tiles_of`
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._pages_C = -(-(layout.starts_C + layout.lengths_C) // layout.page_size)
        firsts_C = np.cumsum(self._pages_C) - self._pages_C
        chunks_C4 = np.stack([layout.offsets()[:-1], layout.starts_C, layout.lengths_C, firsts_C], axis=1)
        is_decode = layout.lengths_C == 1
        self._decodes_C4 = chunks_C4[is_decode].astype(np.int32)
        self.prefills_L4: Ints = chunks_C4[~is_decode].astype(np.int32)
        self.parts = BufferLayout(len(self._decodes_C4), layout.tokens)
        self.size = self.parts.pages + int(self._pages_C.sum())

    def write(self, into: Ints) -> None:
        """Writes the packed layout to `into`, a buffer of `size` numbers."""
        layout, parts = self._layout, self.parts
        into[:HEADER] = keys_seen(self._decodes_C4), 0, 0, 0
        into[HEADER : parts.slots] = self._decodes_C4.ravel()
        into[parts.slots : parts.slots + parts.tokens] = layout.slots()
        into[parts.slots + parts.tokens : parts.pages] = 0
        counts = zip(layout.rows_C.tolist(), self._pages_C.tolist(), strict=True)
        np.concatenate([layout.tables[row, :count] for row, count in counts], out=into[parts.pages :])


def tiles_of(prefills_L4: Ints, queries: int) -> Ints:
    """Returns the chunks cut into tiles [n, 4] of at most `queries` queries.

    Tiles that see most keys come first: a long tile that started last would run alone at the end.
    """
    lengths_L = prefills_L4[:, 2]
    counts_L = -(-lengths_L // queries)
    tiles_n4 = np.repeat(prefills_L4, counts_L, axis=0)
    within_n = np.arange(len(tiles_n4)) - np.repeat(np.cumsum(counts_L) - counts_L, counts_L)
    offset_n = (within_n * queries).astype(np.int32)
    tiles_n4[:, 0] += offset_n
    tiles_n4[:, 1] += offset_n
    tiles_n4[:, 2] = np.minimum(tiles_n4[:, 2] - offset_n, queries)
    order_n: NDArray[np.int64] = np.argsort(-(tiles_n4[:, 1] + tiles_n4[:, 2]), kind="stable")
    return tiles_n4[order_n]


def keys_seen(tiles_n4: Ints) -> int:
    """Returns the number of keys that each tile sees, summed over the tiles, but at most the largest int32."""
    return min(int(tiles_n4[:, 1:3].sum(dtype=np.int64)), _INT32_MAX)
