"""The paged KV cache: two tensors per layer, [pages + 1, page_size, kv_heads, head_dim]; page 0 is scratch.

Does not depend on rows: the scheduler assigns pages to requests.
"""

from __future__ import annotations

import torch

from model_runner.config import ModelConfig
from model_runner.platform.shard import Shard


def page_bytes(config: ModelConfig, page_size: int, dtype: torch.dtype, shard: Shard) -> int:
    """Returns the bytes of one page on this rank: K and V of all layers."""
    heads = shard.share(config.num_kv_heads, "key/value heads")
    return 2 * config.num_layers * page_size * heads * config.head_dim * dtype.itemsize


class KvPool:
    """The KV cache: pages 1..`pages` for requests, and the scratch page 0."""

    def __init__(
        self, config: ModelConfig, pages: int, page_size: int, dtype: torch.dtype, device: torch.device, shard: Shard
    ) -> None:
        self.pages = pages
        self.page_size = page_size
        self.bytes = (pages + 1) * page_bytes(config, page_size, dtype, shard)
        shape = (pages + 1, page_size, shard.share(config.num_kv_heads, "key/value heads"), config.head_dim)
        self._layers = [
            (torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device))
            for _ in range(config.num_layers)
        ]

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the K and the V cache of layer `index`."""
        return self._layers[index]
