"""LoRA by triton kernels, cut by lane: the tokens of a lane are grouped into tiles of at most --max-lora-chunk-size.

A lane's pages are read once per tile, whose tokens may be of several requests. Chunks are sorted, not tokens: only the
rows that remain of a chunk after its full tiles are gathered.
"""

from __future__ import annotations

import numpy as np

from model_runner.compute.kernels.triton.lora.tiling import tile_rows
from model_runner.lora.backends.tiled_backend import DECODE_ROWS, TiledLora
from model_runner.lora.backends.tiles import Tiles, by_lane
from model_runner.step.layout import Layout


class CsgmvLora(TiledLora):
    """Cuts steps into tiles by lane, of 16 rows, or --max-lora-chunk-size if a lane has more than 16 tokens."""

    name = "csgmv"

    def rows(self, layout: Layout) -> int:
        """Returns 16 if no lane has more than 16 tokens, else --max-lora-chunk-size."""
        tokens_L = np.bincount(layout.lanes_C, weights=layout.lengths_C)[1:]
        return tile_rows(int(tokens_L.max(initial=1)), self.options.chunk_size)

    def cut(self, layout: Layout, rows: int) -> Tiles:
        """Cuts chunks into full tiles, and groups the remainders of all chunks by lane."""
        return by_lane(layout, rows)

    def most_tiles(self, tokens: int) -> int:
        """Returns the number of full tiles plus one partly filled tile for each lane, at most `tokens`."""
        return min(tokens, self.pages.max_lanes + tokens // DECODE_ROWS)
