"""Paged attention by the triton kernels: the default on CUDA.

`plan` packs a step into one pinned buffer and copies it once, asynchronously. Chunks of length 1 (decodes) are tiles
from the start; longer ones (prefills) become tiles at the first layer that asks, because how many queries a tile holds
follows from the layer's heads.

Static metadata, for captured decode steps, is the same buffer at one place for ever. Steps of all sizes share that
place: they follow one another on one stream.

Legend: T tokens of the step, n tiles, N query heads, K key/value heads, D head size, P pages, S page size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from engine.errors import ConfigError
from model_runner.compute.attention.base import AttentionBackend
from model_runner.compute.attention.packing import HEADER, Packing, Places, keys_seen, tiles_of
from model_runner.compute.kernels.triton.attention_shapes import Shape, decode_shape, prefill_shape
from model_runner.compute.kernels.triton.interpreter import interpreting
from model_runner.compute.kernels.triton.paged_attention import attend_tiles
from model_runner.compute.kernels.triton.store_kv import store_kv
from model_runner.compute.kernels.triton.target import capability
from model_runner.step.layout import Ints, Layout


@dataclass(frozen=True)
class Tiles:
    """Tiles [n, 4] and the keys they see together [1], on the device."""

    tiles_n4: torch.Tensor
    total: torch.Tensor


@dataclass
class Meta:
    """A step's metadata. Longer chunks stay on the host until a layer wants them as tiles of so many queries."""

    slots_T: torch.Tensor
    pages: torch.Tensor
    decodes: Tiles
    longer_L4: Ints
    prefills: dict[int, Tiles] = field(default_factory=dict)


class StaticMeta:
    """The metadata of a captured step: `tokens` chunks of length 1, planned into one place again and again."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.buffer: torch.Tensor | None = None
        self.meta: Meta | None = None


class TritonAttention(AttentionBackend):
    """Stores K and V, then one launch for the decodes and one for the prefills, each with its merge."""

    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda" and not interpreting():
            raise ConfigError("--attention-backend triton: needs a CUDA device; here it is torch (or auto)")
        self._device = device
        self._shared: torch.Tensor | None = None

    def plan(self, layout: Layout, into: Any | None = None) -> Meta | StaticMeta:
        """One copy, no wait. `into` (from `static`) takes a layout of exactly its chunks, all of length 1."""
        packing = Packing(layout)
        host = self._staging(packing.size)
        packing.write(host.numpy())
        if into is None:
            return _unpack(host.to(self._device, non_blocking=True), packing.places, packing.longer_L4)
        assert isinstance(into, StaticMeta)
        assert layout.chunks == layout.tokens == into.tokens, "a static step has so many chunks of length 1"
        if into.buffer is None:
            into.buffer = self._place(packing.places.pages + into.tokens * layout.tables.shape[1])
            into.meta = _unpack(into.buffer, packing.places, packing.longer_L4)
        into.buffer[: packing.size].copy_(host, non_blocking=True)
        return into

    def static(self, tokens: int) -> StaticMeta:
        """Its buffer finds its place at the first plan. Plan the largest first: the others then share its memory."""
        return StaticMeta(tokens)

    def attend(
        self,
        q_TND: torch.Tensor,
        k_TKD: torch.Tensor,
        v_TKD: torch.Tensor,
        k_cache_PSKD: torch.Tensor,
        v_cache_PSKD: torch.Tensor,
        meta: Meta | StaticMeta,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        store_kv(k_TKD, v_TKD, k_cache_PSKD, v_cache_PSKD, self.slots(meta))
        return self.attend_stored(q_TND, k_cache_PSKD, v_cache_PSKD, meta, scale=scale, window=window, softcap=softcap)

    def slots(self, meta: Meta | StaticMeta) -> torch.Tensor:
        return _planned(meta).slots_T

    def attend_stored(
        self,
        q_TND: torch.Tensor,
        k_cache_PSKD: torch.Tensor,
        v_cache_PSKD: torch.Tensor,
        meta: Meta | StaticMeta,
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

    def _work(self, meta: Meta, q_TND: torch.Tensor, k_cache_PSKD: torch.Tensor) -> list[tuple[Tiles, Shape]]:
        heads, head_dim = q_TND.shape[1:]
        sizes = heads // k_cache_PSKD.shape[2], head_dim, k_cache_PSKD.itemsize, capability(q_TND.device)
        work = []
        if len(meta.decodes.tiles_n4):
            work.append((meta.decodes, decode_shape(*sizes)))
        if len(meta.longer_L4):
            shape = prefill_shape(*sizes)
            if shape.queries not in meta.prefills:
                meta.prefills[shape.queries] = self._upload(tiles_of(meta.longer_L4, shape.queries))
            work.append((meta.prefills[shape.queries], shape))
        return work

    def _upload(self, tiles_n4: Ints) -> Tiles:
        host = self._staging(HEADER + tiles_n4.size)
        numbers = host.numpy()
        numbers[:HEADER], numbers[HEADER:] = keys_seen(tiles_n4), tiles_n4.ravel()
        device = host.to(self._device, non_blocking=True)
        return Tiles(device[HEADER:].view(-1, 4), device[:1])

    def _staging(self, size: int) -> torch.Tensor:
        """Fresh pinned memory every time: torch's pool takes it back when its copy is done."""
        return torch.empty(size, dtype=torch.int32, pin_memory=self._device.type == "cuda")

    def _place(self, size: int) -> torch.Tensor:
        if self._shared is None or len(self._shared) < size:
            self._shared = torch.zeros(size, dtype=torch.int32, device=self._device)
        return self._shared


def _planned(meta: Meta | StaticMeta) -> Meta:
    planned = meta.meta if isinstance(meta, StaticMeta) else meta
    assert planned is not None, "plan into static metadata before using it"
    return planned


def _unpack(buffer: torch.Tensor, places: Places, longer_L4: Ints) -> Meta:
    return Meta(
        slots_T=buffer[places.slots : places.slots + places.tokens],
        pages=buffer[places.pages :],
        decodes=Tiles(buffer[HEADER : places.slots].view(-1, 4), buffer[:1]),
        longer_L4=longer_L4,
    )
