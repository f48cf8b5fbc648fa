"""A step's layout as one int32 buffer for the attention kernels, on the host and in numpy alone.

    header 4 | decode tiles 4 * C | slots T, padded to 4 | pages of the first chunk, of the second, ...
    ^ keys that the decode tiles see together

Each part begins at 16 bytes, so that a kernel never finds its pointers less aligned than when it was compiled.

Legend: T tokens of the step, C chunks of length 1 (decodes), L longer chunks (prefills), n tiles. A tile is (first
token in the batch, its position in its row, how many queries, where its row's pages begin); see kernels/attention.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model_runner.step.layout import Ints, Layout

HEADER = 4
_MOST = np.iinfo(np.int32).max


@dataclass(frozen=True)
class Places:
    """Where the parts of a buffer begin."""

    decodes: int
    tokens: int

    @property
    def slots(self) -> int:
        """The step's slots; before them lie the decode tiles."""
        return HEADER + 4 * self.decodes

    @property
    def pages(self) -> int:
        """The page numbers: the last part, of any length."""
        return self.slots + -(-self.tokens // 4) * 4


class Packing:
    """A layout, measured: `size` numbers for `write`. `places` and `longer` say how to read them."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._pages_C = -(-(layout.starts_C + layout.lengths_C) // layout.page_size)
        firsts_C = np.cumsum(self._pages_C) - self._pages_C
        chunks_C4 = np.stack([layout.offsets()[:-1], layout.starts_C, layout.lengths_C, firsts_C], axis=1)
        single = layout.lengths_C == 1
        self._decodes_C4 = chunks_C4[single].astype(np.int32)
        self.longer_L4: Ints = chunks_C4[~single].astype(np.int32)
        self.places = Places(len(self._decodes_C4), layout.tokens)
        self.size = self.places.pages + int(self._pages_C.sum())

    def write(self, into: Ints) -> None:
        """Fills [size] numbers."""
        layout, places = self._layout, self.places
        into[:HEADER] = keys_seen(self._decodes_C4), 0, 0, 0
        into[HEADER : places.slots] = self._decodes_C4.ravel()
        into[places.slots : places.slots + places.tokens] = layout.slots()
        into[places.slots + places.tokens : places.pages] = 0
        counts = zip(layout.rows_C.tolist(), self._pages_C.tolist(), strict=True)
        np.concatenate([layout.tables[row, :count] for row, count in counts], out=into[places.pages :])


def tiles_of(longer_L4: Ints, queries: int) -> Ints:
    """[n, 4]: chunks in tiles of `queries`. Those that see most keys come first, so that none of them starts last."""
    lengths_L = longer_L4[:, 2]
    counts_L = -(-lengths_L // queries)
    tiles_n4 = np.repeat(longer_L4, counts_L, axis=0)
    within_n = np.arange(len(tiles_n4)) - np.repeat(np.cumsum(counts_L) - counts_L, counts_L)
    done_n = (within_n * queries).astype(np.int32)
    tiles_n4[:, 0] += done_n
    tiles_n4[:, 1] += done_n
    tiles_n4[:, 2] = np.minimum(tiles_n4[:, 2] - done_n, queries)
    order_n: NDArray[np.int64] = np.argsort(-(tiles_n4[:, 1] + tiles_n4[:, 2]), kind="stable")
    return tiles_n4[order_n]


def keys_seen(tiles_n4: Ints) -> int:
    """Keys that these tiles see together, or the largest int32."""
    return min(int(tiles_n4[:, 1:3].sum(dtype=np.int64)), _MOST)
