"""The table of the runner's rows: each row's generation, KV pages, lane, and last sampled token.

Pages and lanes are numbers that the scheduler assigns, kept on the host. The last sampled tokens stay on the device,
so a decode chunk carries no token, and a step can be launched before the host has the result of the previous step.
Does not depend on what a page or a lane holds.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from engine.errors import InternalError
from engine.messages import Chunk, NewRow


class RowTable:
    """All rows of a runner, as arrays indexed by row. A message that contradicts a row's state raises InternalError.

    tables         [rows + 1, max_pages] int32: KV page numbers, 0 past a row's page count
    last_tokens_R  [rows] int64 on the device: the last sampled token of each row
    scratch        the index of the last line of `tables`, which stays zero: the padding of captured steps uses it
    """

    def __init__(self, rows: int, max_pages: int, page_size: int, device: torch.device) -> None:
        self.page_size = page_size
        self.scratch = rows
        self.tables: NDArray[np.int32] = np.zeros((rows + 1, max_pages), np.int32)
        self.page_counts: NDArray[np.int32] = np.zeros(rows, np.int32)
        self.generations: NDArray[np.int64] = np.full(rows, -1, np.int64)
        self.prompt_lengths: NDArray[np.int32] = np.zeros(rows, np.int32)
        self.lanes: NDArray[np.int32] = np.zeros(rows, np.int32)
        self.last_tokens_R = torch.zeros(rows, dtype=torch.int64, device=device)

    def begin(self, new: NewRow) -> None:
        """Starts a new generation of row `new.row` and clears the pages and the lane of the previous one."""
        if not 0 <= new.row < len(self.generations):
            raise InternalError(f"row {new.row} is not one of {len(self.generations)} rows")
        if new.generation <= self.generations[new.row]:
            raise InternalError(f"row {new.row}: generation {new.generation} after {self.generations[new.row]}")
        self.generations[new.row] = new.generation
        self.tables[new.row, : self.page_counts[new.row]] = 0
        self.page_counts[new.row] = 0
        self.prompt_lengths[new.row] = new.prompt_length
        self.lanes[new.row] = 0

    def add_chunk(self, chunk: Chunk) -> None:
        """Appends the chunk's pages to its row's page table, and sets the row's lane to the chunk's."""
        row = chunk.row
        if not 0 <= row < len(self.generations) or self.generations[row] != chunk.generation:
            raise InternalError(
                f"a chunk for row {row} generation {chunk.generation}, but the row holds another generation"
            )
        held, limit = int(self.page_counts[row]), self.tables.shape[1]
        count = held + len(chunk.pages)
        if chunk.length < 1 or chunk.start + chunk.length > count * self.page_size or count > limit:
            raise InternalError(
                f"row {row}: positions {chunk.start}..{chunk.start + chunk.length - 1} do not fit its {count} pages"
                f" of {self.page_size} (at most {limit})"
            )
        self.tables[row, held:count] = chunk.pages
        self.page_counts[row] = count
        self.lanes[row] = chunk.lane

    def reset(self) -> None:
        """Clears the pages, generations and lanes of all rows."""
        self.tables.fill(0)
        self.page_counts.fill(0)
        self.generations.fill(-1)
        self.lanes.fill(0)
