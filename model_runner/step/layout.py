"""The chunks of one step as host arrays, in the order of the batch. Uses numpy only, no tensors.

Legend: C chunks of the step, T tokens of the step (sum of lengths).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int32]


@dataclass(frozen=True)
class Layout:
    """The chunks of one step, from which attention and LoRA backends plan their metadata.

    rows_C     the row of each chunk (index into `tables`)
    starts_C   for each chunk, the number of its row's tokens that are in the KV cache before the step
    lengths_C  the number of tokens of each chunk (>= 1)
    lanes_C    the lane of each chunk (0 = base)
    tables     KV page numbers by row, [rows, max_pages]; entries past a row's length are 0
    page_size  the number of tokens in a page
    """

    rows_C: Ints
    starts_C: Ints
    lengths_C: Ints
    lanes_C: Ints
    tables: Ints
    page_size: int

    @property
    def chunks(self) -> int:
        """The number of chunks."""
        return len(self.rows_C)

    @property
    def tokens(self) -> int:
        """The number of tokens of all chunks."""
        return int(self.lengths_C.sum())

    def offsets(self) -> Ints:
        """Returns [C + 1]: the index of each chunk's first token in the flat batch; the last entry is T."""
        return np.concatenate([[0], np.cumsum(self.lengths_C)]).astype(np.int32)

    def positions(self) -> Ints:
        """Returns [T]: the position of each token in its row."""
        offsets = self.offsets()
        within = np.arange(offsets[-1], dtype=np.int32) - np.repeat(offsets[:-1], self.lengths_C)
        return (within + np.repeat(self.starts_C, self.lengths_C)).astype(np.int32)

    def slots(self) -> NDArray[np.int64]:
        """Returns [T]: the cache slot of each token's K and V: page number * page_size + offset in the page."""
        positions = self.positions()
        rows_T = np.repeat(self.rows_C, self.lengths_C)
        pages_T = self.tables[rows_T, positions // self.page_size].astype(np.int64)
        return pages_T * self.page_size + positions % self.page_size
