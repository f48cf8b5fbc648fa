"""LoRA by triton kernels, cut by request: every chunk of a step is tiles of its own, whoever else has its lane.

Nothing is gathered, so planning and addressing are the simplest; requests of one lane read its pages once each.
"""

from __future__ import annotations

from model_runner.compute.kernels.triton.lora.tiling import tile_rows
from model_runner.lora.backends.tiled_backend import TiledLora
from model_runner.lora.backends.tiles import Tiles, by_request
from model_runner.step.layout import Layout

MOST_ROWS = 64


class TritonLora(TiledLora):
    """Tiles by request, of as many rows as the longest chunk wants."""

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
