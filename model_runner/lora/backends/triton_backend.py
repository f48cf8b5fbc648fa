"""LoRA by triton kernels, cut by request: no tile has rows of two chunks, even of the same lane.

Nothing is gathered, so planning and addressing are simple; each request of a lane reads the lane's pages by itself.
"""

from __future__ import annotations

from model_runner.compute.kernels.triton.lora.tiling import tile_rows
from model_runner.lora.backends.tiled_backend import TiledLora
from model_runner.lora.backends.tiles import Tiles, by_request
from model_runner.step.layout import Layout

MOST_ROWS = 64


class TritonLora(TiledLora):
    """Tiles by request, with as many rows as the longest chunk needs."""

    name = "triton"

    def rows(self, layout: Layout) -> int:
        """16 to 64."""
        return tile_rows(int(layout.lengths_C[layout.lanes_C > 0].max(initial=1)), MOST_ROWS)

    def cut(self, layout: Layout, rows: int) -> Tiles:
        """Chunk by chunk."""
        return by_request(layout, rows)

    def most_tiles(self, tokens: int) -> int:
        """One for each token."""
        return tokens

    @property
    def gathers(self) -> bool:
        """Never."""
        return False
