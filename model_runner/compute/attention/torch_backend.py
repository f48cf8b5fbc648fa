"""Paged attention in torch, on any device: the reference, and with its C++ kernel the fast path on a CPU.

The kernel computes a whole step in one call, except chunks of several tokens that exceed a sliding window. Without it,
chunks of length 1 (decodes) are computed together, padded to a common length, and longer ones (prefills) one by one.
Padding repeats the row's newest token and is masked, so only a row's own pages are ever read for it.

    decode  row a  [k0 k1 k2 k3 k4]        with a window the gather begins at the first position that is seen
            row b  [k0 k1 k2 k2 k2]  <- masked repeats

Legend: T tokens of the step, C chunks, L gathered positions, n tokens of a chunk, N query heads, K key/value heads,
D head size, P pages, S page size, M = P S slots.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from model_runner.compute.attention import dense
from model_runner.compute.attention.base import AttentionBackend
from model_runner.compute.attention.dense import Scores
from model_runner.compute.kernels.cpu.functions.attention import supports
from model_runner.compute.kernels.cpu.functions.spec import Kernel, KernelKey
from model_runner.compute.kernels.cpu.kernels import KernelSet
from model_runner.compute.kernels.cpu.lookup import KernelLookup
from model_runner.config import ModelConfig
from model_runner.platform.device import dtype_name
from model_runner.step.layout import Layout

_SHORTEST_BUCKET = 64


@dataclass(frozen=True)
class _Decode:
    """Chunks of length 1 that are computed together.

    tokens_C   their tokens, None if the step has no other chunks
    slots_CL   the slots that they see, padded
    seen_CL    which of these are not padding
    """

    tokens_C: torch.Tensor | None
    slots_CL: torch.Tensor
    seen_CL: torch.Tensor


@dataclass(frozen=True)
class _Prefill:
    """A longer chunk: tokens begin..end - 1, and the slots that it sees.

    seen_nL   which slots each token sees; None: the chunk sees only itself, causally
    """

    begin: int
    end: int
    slots_L: torch.Tensor
    seen_nL: torch.Tensor | None


@dataclass(frozen=True)
class _Plan:
    """How a step is computed in layers of one window. `kernel_plan`: the kernel's argument for the rows it computes."""

    decodes: list[_Decode]
    prefills: list[_Prefill]
    kernel_plan: torch.Tensor | None


@dataclass(frozen=True)
class TorchAttentionMetadata:
    """A step's metadata; the plan of each window size is made at the first layer that has it."""

    layout: Layout
    slots_T: torch.Tensor
    plans: dict[int | None, _Plan] = field(default_factory=dict)


class TorchAttention(AttentionBackend):
    """Gathers K and V by slot and calls scaled_dot_product_attention; on a CPU the C++ kernel replaces both."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: dict[tuple[str, torch.dtype], torch.Tensor] = {}
        self._kernels = KernelLookup()

    def use_kernels(self, kernels: KernelSet) -> None:
        self._kernels.use(kernels)

    def wanted_kernels(self, config: ModelConfig, dtype: torch.dtype) -> list[KernelKey]:
        called = config.attention_cap is None and supports(
            config.num_heads, config.num_kv_heads, config.head_dim, dtype
        )
        return [KernelKey("attend", dtype_name(dtype))] if called else []

    def plan(self, layout: Layout, into: Any | None = None) -> TorchAttentionMetadata:
        """The slots of the step's tokens. There is no static metadata, so `into` must be None."""
        assert into is None, "this backend has no static metadata"
        return TorchAttentionMetadata(layout, self._tensor(layout.slots()))

    def slots(self, meta: TorchAttentionMetadata) -> torch.Tensor | None:
        return meta.slots_T

    def attend(
        self,
        q_TND: torch.Tensor,
        k_TKD: torch.Tensor,
        v_TKD: torch.Tensor,
        k_cache_PSKD: torch.Tensor,
        v_cache_PSKD: torch.Tensor,
        meta: TorchAttentionMetadata,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        k_cache_PSKD.flatten(0, 1).index_copy_(0, meta.slots_T, k_TKD)
        v_cache_PSKD.flatten(0, 1).index_copy_(0, meta.slots_T, v_TKD)
        return self.attend_stored(q_TND, k_cache_PSKD, v_cache_PSKD, meta, scale=scale, window=window, softcap=softcap)

    def attend_stored(
        self,
        q_TND: torch.Tensor,
        k_cache_PSKD: torch.Tensor,
        v_cache_PSKD: torch.Tensor,
        meta: TorchAttentionMetadata,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        caches = k_cache_PSKD.flatten(0, 1), v_cache_PSKD.flatten(0, 1)
        scores = Scores(scale, softcap)
        kernel = self._kernel(q_TND, k_cache_PSKD, scores)
        if window not in meta.plans:
            meta.plans[window] = self._plan(meta.layout, window, use_kernel=kernel is not None)
        plan = meta.plans[window]
        if len(plan.decodes) == 1 and plan.decodes[0].tokens_C is None:
            return self._decode(q_TND, *caches, plan.decodes[0], scores)
        out_TND = torch.empty_like(q_TND, memory_format=torch.contiguous_format)
        if plan.kernel_plan is not None:
            assert kernel is not None
            heads = q_TND.shape[1], *k_cache_PSKD.shape[2:]
            kernel(q_TND.contiguous(), *caches, out_TND, plan.kernel_plan, *heads, scale)
        for decode in plan.decodes:
            out_TND[decode.tokens_C] = self._decode(q_TND[decode.tokens_C], *caches, decode, scores)
        for prefill in plan.prefills:
            tokens = slice(prefill.begin, prefill.end)
            out_TND[tokens] = self._prefill(q_TND[tokens], *caches, prefill, scores)
        return out_TND

    def _decode(
        self, q_CND: torch.Tensor, k_MKD: torch.Tensor, v_MKD: torch.Tensor, decode: _Decode, scores: Scores
    ) -> torch.Tensor:
        k = self._gather("k", k_MKD, decode.slots_CL)
        v = self._gather("v", v_MKD, decode.slots_CL)
        return dense.decode(q_CND, k, v, decode.seen_CL, scores)

    def _prefill(
        self, q_nND: torch.Tensor, k_MKD: torch.Tensor, v_MKD: torch.Tensor, prefill: _Prefill, scores: Scores
    ) -> torch.Tensor:
        k, v = (cache.index_select(0, prefill.slots_L) for cache in (k_MKD, v_MKD))
        return dense.prefill(q_nND, k, v, prefill.seen_nL, scores)

    def _kernel(self, q_TND: torch.Tensor, k_cache_PSKD: torch.Tensor, scores: Scores) -> Kernel | None:
        """The C++ kernel, if it is built and supports these heads and scores."""
        sizes = q_TND.shape[1], k_cache_PSKD.shape[2], q_TND.shape[2]
        if scores.softcap is not None or q_TND.dtype is not k_cache_PSKD.dtype or not supports(*sizes, q_TND.dtype):
            return None
        return self._kernels.get("attend", q_TND.dtype)

    def _plan(self, layout: Layout, window: int | None, *, use_kernel: bool) -> _Plan:
        offsets, single = layout.offsets(), layout.lengths_C == 1
        in_torch = np.full(layout.chunks, not use_kernel)
        if use_kernel and window is not None:  # in the kernel all tokens of a chunk see from the same slot on
            in_torch = ~single & (layout.starts_C + layout.lengths_C > window)
        in_kernel = np.flatnonzero(~in_torch)
        decodes = _buckets(layout, in_torch & single, window)
        return _Plan(
            [self._plan_decode(layout, chunks, offsets, window) for chunks in decodes],
            [
                self._plan_prefill(layout, chunk, offsets, window)
                for chunk in np.flatnonzero(in_torch & ~single).tolist()
            ],
            self._plan_kernel(layout, in_kernel, offsets, window) if len(in_kernel) else None,
        )

    def _plan_kernel(self, layout: Layout, chunks_C: Any, offsets: Any, window: int | None) -> torch.Tensor:
        """The kernel's argument (see kernels/cpu/functions/attention.py): the number of rows, each row's first token,
        number of tokens and end of its slots, then the slots of all rows.
        """
        lengths_C = layout.lengths_C[chunks_C].astype(np.int64)
        stops_C = layout.starts_C[chunks_C].astype(np.int64) + lengths_C
        seen_C = stops_C if window is None else np.minimum(stops_C, window)
        ends_C = seen_C.cumsum()
        positions = np.arange(ends_C[-1]) + np.repeat(stops_C - ends_C, seen_C)
        slots = _slots(layout, np.repeat(layout.rows_C[chunks_C], seen_C), positions)
        parts = [[len(chunks_C)], offsets[chunks_C], lengths_C, ends_C, slots]
        return torch.from_numpy(np.concatenate(parts).astype(np.int64))

    def _plan_decode(self, layout: Layout, chunks_C: Any, offsets: Any, window: int | None) -> _Decode:
        last_C = layout.starts_C[chunks_C].astype(np.int64)
        first_C = np.zeros_like(last_C) if window is None else np.maximum(last_C - window + 1, 0)
        longest = int((last_C - first_C).max()) + 1
        positions_CL = first_C[:, None] + np.arange(longest)
        seen_CL = positions_CL <= last_C[:, None]
        positions_CL = np.minimum(positions_CL, last_C[:, None])
        slots_CL = _slots(layout, layout.rows_C[chunks_C][:, None], positions_CL)
        return _Decode(
            None if len(chunks_C) == layout.chunks else self._tensor(offsets[chunks_C].astype(np.int64)),
            self._tensor(slots_CL),
            self._tensor(seen_CL),
        )

    def _plan_prefill(self, layout: Layout, chunk: int, offsets: Any, window: int | None) -> _Prefill:
        start, length = int(layout.starts_C[chunk]), int(layout.lengths_C[chunk])
        begin, stop = int(offsets[chunk]), start + length
        first = 0 if window is None else max(0, start - window + 1)
        keys_L, queries_n = np.arange(first, stop), np.arange(start, stop)[:, None]
        seen_nL = None
        if start or (window is not None and window < stop):
            seen_nL = keys_L <= queries_n
            if window is not None:
                seen_nL &= keys_L > queries_n - window
        slots_L = self._tensor(_slots(layout, layout.rows_C[chunk], keys_L))
        return _Prefill(begin, begin + length, slots_L, None if seen_nL is None else self._tensor(seen_nL))

    def _gather(self, name: str, cache: torch.Tensor, slots_CL: torch.Tensor) -> torch.Tensor:
        """[C, K, L, D] of the flat cache [P * S, K, D], in a buffer that is valid until the next gather of this name.

        Allocating memory for every layer would cost a CPU four times the copy itself, in page faults.
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


def _buckets(layout: Layout, which_C: NDArray[np.bool_], window: int | None) -> list[NDArray[np.intp]]:
    """Groups the chunks whose lengths round up to the same power of two: at most half of a gather is padding."""
    buckets: dict[int, list[int]] = {}
    for chunk in np.flatnonzero(which_C).tolist():
        seen = int(layout.starts_C[chunk]) + 1
        length = seen if window is None else min(seen, window)
        buckets.setdefault(max(_SHORTEST_BUCKET, 1 << (length - 1).bit_length()), []).append(chunk)
    return [np.array(chunks) for _, chunks in sorted(buckets.items())]


def _slots(layout: Layout, rows: Any, positions: NDArray[np.int64]) -> NDArray[np.int64]:
    """The slots in the flat cache of these positions of these rows."""
    pages: NDArray[np.int64] = layout.tables[rows, positions // layout.page_size].astype(np.int64)
    slots: NDArray[np.int64] = pages * layout.page_size + positions % layout.page_size
    return slots
