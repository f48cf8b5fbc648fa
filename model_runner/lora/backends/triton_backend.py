"""LoRA by triton kernels, cut by request: no tile has rows of two chunks, even of the same lane.

Nothing is gathered, so planning and addressing are simple; but each request of a lane reads the lane's pages again.
"""

from __future__ import annotations

from model_runner.compute.kernels.triton.lora.tiling import tile_rows
from model_runner.lora.backends.tiled_backend import TiledLora
from model_runner.lora.backends.tiles import Tiles, by_request
from model_runner.step.layout import Layout

MOST_ROWS = 64


class TritonLora(TiledLora):
    """Cuts steps into tiles by request, of 16 rows, or of MOST_ROWS if the longest chunk has more than 16 tokens."""

    name = "triton"

    def rows(self, layout: Layout) -> int:
        """Returns 16 if no chunk with an adapter has more than 16 tokens, else MOST_ROWS."""
        return tile_rows(int(layout.lengths_C[layout.lanes_C > 0].max(initial=1)), MOST_ROWS)

    def cut(self, layout: Layout, rows: int) -> Tiles:
        """Cuts each chunk by itself, so that no tile has rows of two chunks."""
        return by_request(layout, rows)

    def most_tiles(self, tokens: int) -> int:
        """Returns one tile for each token: every chunk of length 1 is a tile."""
        return tokens

    @property
    def gathers(self) -> bool:
        """False: the rows of a tile are always adjacent in the batch."""
        return False
