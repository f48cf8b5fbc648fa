"""Paged attention in plain torch, on any device: the reference, and the fast path on a CPU.

Chunks of length 1 (decodes) of a step go together, padded to a common length; longer chunks (prefills) one by one. A
padded place points at the row's own newest token and is masked, so nothing but a row's own pages is ever read for it.

    decode  row a  [k0 k1 k2 k3 k4]        window w: the gather begins at the first position that is seen
            row b  [k0 k1 k2 k2 k2]  <- masked repeats

Legend: T tokens of the step, C chunks, L gathered positions, n tokens of a chunk, N query heads, K key/value heads,
G = N / K, D head size, P pages, S page size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import scaled_dot_product_attention

from model_runner.attention.base import AttentionBackend
from model_runner.layout import Layout

_SHORTEST_BUCKET = 64


@dataclass(frozen=True)
class _Decode:
    """Some chunks of length 1: their tokens [C], the slots they see [C, L], which of these are real [C, 1, 1, L]."""

    tokens_C: torch.Tensor
    slots_CL: torch.Tensor
    seen_C11L: torch.Tensor


@dataclass(frozen=True)
class _Prefill:
    """One longer chunk: its tokens, and the slots [L] it sees, or None where the chunk itself is all it sees.

    `seen_nL` is None where plain causality is enough.
    """

    begin: int
    end: int
    slots_L: torch.Tensor | None
    seen_nL: torch.Tensor | None


@dataclass(frozen=True)
class _Plan:
    """What a step gathers, for layers of one window."""

    decodes: list[_Decode]
    prefills: list[_Prefill]


@dataclass(frozen=True)
class Meta:
    """A step's metadata; plans are made at the first layer of each window size."""

    layout: Layout
    slots_T: torch.Tensor
    plans: dict[int | None, _Plan] = field(default_factory=dict)


class TorchAttention(AttentionBackend):
    """Gathers by slot, attends by scaled_dot_product_attention."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: dict[tuple[str, torch.dtype], torch.Tensor] = {}

    def plan(self, layout: Layout, into: Any | None = None) -> Meta:
        """Slots of the step's tokens; `into` is for backends that graphs replay."""
        assert into is None, "this backend has no static buffers"
        return Meta(layout, self._tensor(layout.slots()))

    def attend(
        self,
        q_TND: torch.Tensor,
        k_TKD: torch.Tensor,
        v_TKD: torch.Tensor,
        k_cache_PSKD: torch.Tensor,
        v_cache_PSKD: torch.Tensor,
        meta: Meta,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        k_cache, v_cache = k_cache_PSKD.flatten(0, 1), v_cache_PSKD.flatten(0, 1)
        k_cache.index_copy_(0, meta.slots_T, k_TKD)
        v_cache.index_copy_(0, meta.slots_T, v_TKD)
        if window not in meta.plans:
            meta.plans[window] = self._plan(meta.layout, window)
        plan = meta.plans[window]
        out_TND = torch.empty_like(q_TND, memory_format=torch.contiguous_format)
        for decode in plan.decodes:
            k = self._gather("k", k_cache, decode.slots_CL)
            v = self._gather("v", v_cache, decode.slots_CL)
            out_TND[decode.tokens_C] = _decode(q_TND[decode.tokens_C], k, v, decode.seen_C11L, scale, softcap)
        for prefill in plan.prefills:
            here = slice(prefill.begin, prefill.end)
            if prefill.slots_L is None:
                k, v = k_TKD[here], v_TKD[here]
            else:
                k, v = k_cache[prefill.slots_L], v_cache[prefill.slots_L]
            out_TND[here] = _prefill(q_TND[here], k, v, prefill.seen_nL, scale, softcap)
        return out_TND

    def _plan(self, layout: Layout, window: int | None) -> _Plan:
        single = layout.lengths_C == 1
        offsets = layout.offsets()
        buckets: dict[int, list[int]] = {}
        for chunk in np.flatnonzero(single).tolist():
            seen = int(layout.starts_C[chunk]) + 1
            buckets.setdefault(_bucket(seen if window is None else min(seen, window)), []).append(chunk)
        decodes = [
            self._plan_decode(layout, np.array(chunks), offsets, window) for _, chunks in sorted(buckets.items())
        ]
        prefills = [self._plan_prefill(layout, chunk, offsets, window) for chunk in np.flatnonzero(~single).tolist()]
        return _Plan(decodes, prefills)

    def _plan_decode(self, layout: Layout, chunks_C: Any, offsets: Any, window: int | None) -> _Decode:
        last_C = layout.starts_C[chunks_C].astype(np.int64)
        first_C = np.zeros_like(last_C) if window is None else np.maximum(last_C - window + 1, 0)
        longest = int((last_C - first_C).max()) + 1
        positions_CL = first_C[:, None] + np.arange(longest)
        seen_CL = positions_CL <= last_C[:, None]
        positions_CL = np.minimum(positions_CL, last_C[:, None])
        slots_CL = _slots(layout, layout.rows_C[chunks_C][:, None], positions_CL)
        return _Decode(
            self._tensor(offsets[chunks_C].astype(np.int64)),
            self._tensor(slots_CL),
            self._tensor(seen_CL[:, None, None, :]),
        )

    def _plan_prefill(self, layout: Layout, chunk: int, offsets: Any, window: int | None) -> _Prefill:
        start, length = int(layout.starts_C[chunk]), int(layout.lengths_C[chunk])
        begin, stop = int(offsets[chunk]), start + length
        if start == 0 and (window is None or window >= length):
            return _Prefill(begin, begin + length, None, None)
        first = 0 if window is None else max(0, start - window + 1)
        keys_L, queries_n = np.arange(first, stop), np.arange(start, stop)[:, None]
        seen_nL = keys_L <= queries_n
        if window is not None:
            seen_nL &= keys_L > queries_n - window
        slots_L = self._tensor(_slots(layout, layout.rows_C[chunk], keys_L)) if start else None
        return _Prefill(begin, begin + length, slots_L, self._tensor(seen_nL))

    def _gather(self, name: str, cache: torch.Tensor, slots_CL: torch.Tensor) -> torch.Tensor:
        """[C, K, L, D] of the flat cache [P * S, K, D], in a buffer that lives until the next gather of this name.

        Fresh memory for every layer would cost a CPU four times the copy itself, in page faults.
        """
        size = slots_CL.numel() * cache[0].numel()
        buffer = self._buffers.get((name, cache.dtype))
        if buffer is None or buffer.numel() < size:
            buffer = torch.empty(size + size // 4, dtype=cache.dtype, device=cache.device)
            self._buffers[name, cache.dtype] = buffer
        gathered = buffer[:size].view(slots_CL.numel(), *cache.shape[1:])
        torch.index_select(cache, 0, slots_CL.flatten(), out=gathered)
        return gathered.view(*slots_CL.shape, *cache.shape[1:]).transpose(1, 2)

    def _tensor(self, host: NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(host).to(self._device, non_blocking=True)


def _bucket(length: int) -> int:
    """Rows whose lengths round up to one power of two share a gather: at most half of it is padding."""
    return max(_SHORTEST_BUCKET, 1 << (length - 1).bit_length())


def _slots(layout: Layout, rows: Any, positions: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where these positions of these rows live in the flat cache."""
    pages: NDArray[np.int64] = layout.tables[rows, positions // layout.page_size].astype(np.int64)
    slots: NDArray[np.int64] = pages * layout.page_size + positions % layout.page_size
    return slots


def _decode(
    q_CND: torch.Tensor,
    k_CKLD: torch.Tensor,
    v_CKLD: torch.Tensor,
    seen_C11L: torch.Tensor,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """[C, N, D]. The G query heads of a key/value head stand where a prefill has its tokens, so K is not repeated."""
    chunks, heads, _, size = k_CKLD.shape
    q_CKGD = q_CND.reshape(chunks, heads, -1, size)
    seen = seen_C11L.expand(-1, 1, q_CKGD.shape[2], -1)
    if softcap is not None:
        return _softcapped(q_CKGD, k_CKLD, v_CKLD, seen, scale, softcap).flatten(1, 2)
    return scaled_dot_product_attention(q_CKGD, k_CKLD, v_CKLD, attn_mask=seen, scale=scale).flatten(1, 2)


def _prefill(
    q_nND: torch.Tensor,
    k_LKD: torch.Tensor,
    v_LKD: torch.Tensor,
    seen_nL: torch.Tensor | None,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """[n, N, D], with K as the batch, G as the heads, and each key/value head seen G times without a copy."""
    _, heads, size = k_LKD.shape
    q_KGnD = q_nND.reshape(len(q_nND), heads, -1, size).permute(1, 2, 0, 3)
    k, v = (x.transpose(0, 1)[:, None].expand(-1, q_KGnD.shape[1], -1, -1) for x in (k_LKD, v_LKD))
    if softcap is not None:
        causal = torch.ones(len(q_nND), len(k_LKD), dtype=torch.bool, device=q_nND.device).tril()
        out = _softcapped(q_KGnD, k, v, causal if seen_nL is None else seen_nL, scale, softcap)
    else:
        out = scaled_dot_product_attention(q_KGnD, k, v, attn_mask=seen_nL, is_causal=seen_nL is None, scale=scale)
    return out.permute(2, 0, 1, 3).flatten(1, 2)


def _softcapped(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor, scale: float, softcap: float
) -> torch.Tensor:
    """What scaled_dot_product_attention cannot do: a score s becomes softcap * tanh(s / softcap) before the mask."""
    scores = softcap * torch.tanh((q @ k.transpose(-1, -2)).float() * (scale / softcap))
    return scores.masked_fill(~seen, -torch.inf).softmax(-1).to(v.dtype) @ v
