"""Paged attention by the triton kernels: the default on CUDA.

`plan` packs a step into one pinned buffer and copies it once, asynchronously. A chunk of length 1 (a decode) is one
tile; longer chunks (prefills) are cut into tiles at the first layer that needs them, because the number of queries in
a tile depends on the layer's heads.

Static metadata, for captured decode steps, is a packed buffer at a fixed address. Captured steps of all sizes share
one buffer, since they follow one another on one stream.

Legend: T tokens of the step, n tiles, N query heads, K key/value heads, D head size, P pages, S page size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from engine.errors import ConfigError
from model_runner.compute.attention.base import AttentionBackend
from model_runner.compute.attention.packing import HEADER, BufferLayout, PackedLayout, keys_seen, tiles_of
from model_runner.compute.kernels.triton.attention_shapes import Shape, decode_shape, prefill_shape
from model_runner.compute.kernels.triton.interpreter import interpreting
from model_runner.compute.kernels.triton.paged_attention import attend_tiles
from model_runner.compute.kernels.triton.store_kv import store_kv
from model_runner.compute.kernels.triton.target import capability
from model_runner.step.layout import Ints, Layout


@dataclass(frozen=True)
class Tiles:
    """Tiles [n, 4] on the device, and `total` [1]: the number of keys that each tile sees, summed over the tiles."""

    tiles_n4: torch.Tensor
    total: torch.Tensor


@dataclass
class TritonAttentionMetadata:
    """A step's metadata. `prefills`: the tiles of the longer chunks, by the number of queries in a tile; made at the
    first layer that needs this number.
    """

    slots_T: torch.Tensor
    pages: torch.Tensor
    decodes: Tiles
    prefills_L4: Ints
    prefills: dict[int, Tiles] = field(default_factory=dict)


class StaticTritonMetadata:
    """The metadata of a captured step of `tokens` chunks of length 1. Each call of `plan` overwrites the buffer."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.buffer: torch.Tensor | None = None
        self.meta: TritonAttentionMetadata | None = None


class TritonAttention(AttentionBackend):
    """Stores K and V, then launches the attention and the merge kernel: once for decodes and once for prefills."""

    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda" and not interpreting():
            raise ConfigError("--attention-backend triton: needs a CUDA device; here it is torch (or auto)")
        self._device = device
        self._shared: torch.Tensor | None = None

    def plan(self, layout: Layout, into: Any | None = None) -> TritonAttentionMetadata | StaticTritonMetadata:
        """Packs the layout and copies it to the device once, without waiting for the copy."""
        packing = PackedLayout(layout)
        host = self._staging(packing.size)
        packing.write(host.numpy())
        if into is None:
            return _unpack(host.to(self._device, non_blocking=True), packing.parts, packing.prefills_L4)
        assert isinstance(into, StaticTritonMetadata)
        assert layout.chunks == layout.tokens == into.tokens, (
            "static metadata is for exactly its number of chunks, all of length 1"
        )
        if into.buffer is None:
            into.buffer = self._shared_buffer(packing.parts.pages + into.tokens * layout.tables.shape[1])
            into.meta = _unpack(into.buffer, packing.parts, packing.prefills_L4)
        into.buffer[: packing.size].copy_(host, non_blocking=True)
        return into

    def static(self, tokens: int) -> StaticTritonMetadata:
        """Returns metadata without a buffer, which the first `plan` into it allocates.

        Plan the largest size first, so that the smaller ones share its buffer.
        """
        return StaticTritonMetadata(tokens)

    def attend(
        self,
        q_TND: torch.Tensor,
        k_TKD: torch.Tensor,
        v_TKD: torch.Tensor,
        k_cache_PSKD: torch.Tensor,
        v_cache_PSKD: torch.Tensor,
        meta: TritonAttentionMetadata | StaticTritonMetadata,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        store_kv(k_TKD, v_TKD, k_cache_PSKD, v_cache_PSKD, self.slots(meta))
        return self.attend_stored(q_TND, k_cache_PSKD, v_cache_PSKD, meta, scale=scale, window=window, softcap=softcap)

    def slots(self, meta: TritonAttentionMetadata | StaticTritonMetadata) -> torch.Tensor:
        return _planned(meta).slots_T

    def attend_stored(
        self,
        q_TND: torch.Tensor,
        k_cache_PSKD: torch.Tensor,
        v_cache_PSKD: torch.Tensor,
        meta: TritonAttentionMetadata | StaticTritonMetadata,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        planned, out_TND = _planned(meta), torch.empty_like(q_TND, memory_format=torch.contiguous_format)
        for tiles, shape in self._work(planned, q_TND, k_cache_PSKD):
            attend_tiles(
                q_TND,
                k_cache_PSKD,
                v_cache_PSKD,
                out_TND,
                tiles.tiles_n4,
                planned.pages,
                tiles.total,
                shape,
                scale=scale,
                window=window,
                softcap=softcap,
            )
        return out_TND

    def _work(
        self, meta: TritonAttentionMetadata, q_TND: torch.Tensor, k_cache_PSKD: torch.Tensor
    ) -> list[tuple[Tiles, Shape]]:
        heads, head_dim = q_TND.shape[1:]
        sizes = heads // k_cache_PSKD.shape[2], head_dim, k_cache_PSKD.itemsize, capability(q_TND.device)
        work = []
        if len(meta.decodes.tiles_n4):
            work.append((meta.decodes, decode_shape(*sizes)))
        if len(meta.prefills_L4):
            shape = prefill_shape(*sizes)
            if shape.queries not in meta.prefills:
                meta.prefills[shape.queries] = self._upload(tiles_of(meta.prefills_L4, shape.queries))
            work.append((meta.prefills[shape.queries], shape))
        return work

    def _upload(self, tiles_n4: Ints) -> Tiles:
        host = self._staging(HEADER + tiles_n4.size)
        numbers = host.numpy()
        numbers[:HEADER], numbers[HEADER:] = keys_seen(tiles_n4), tiles_n4.ravel()
        device = host.to(self._device, non_blocking=True)
        return Tiles(device[HEADER:].view(-1, 4), device[:1])

    def _staging(self, size: int) -> torch.Tensor:
        """Returns new host memory, pinned for CUDA; torch's host allocator reuses it once the copy from it is done."""
        return torch.empty(size, dtype=torch.int32, pin_memory=self._device.type == "cuda")

    def _shared_buffer(self, size: int) -> torch.Tensor:
        if self._shared is None or len(self._shared) < size:
            self._shared = torch.zeros(size, dtype=torch.int32, device=self._device)
        return self._shared


def _planned(meta: TritonAttentionMetadata | StaticTritonMetadata) -> TritonAttentionMetadata:
    planned = meta.meta if isinstance(meta, StaticTritonMetadata) else meta
    assert planned is not None, "static metadata is used before a plan"
    return planned


def _unpack(buffer: torch.Tensor, parts: BufferLayout, prefills_L4: Ints) -> TritonAttentionMetadata:
    return TritonAttentionMetadata(
        slots_T=buffer[parts.slots : parts.slots + parts.tokens],
        pages=buffer[parts.pages :],
        decodes=Tiles(buffer[HEADER : parts.slots].view(-1, 4), buffer[:1]),
        prefills_L4=prefills_L4,
    )
