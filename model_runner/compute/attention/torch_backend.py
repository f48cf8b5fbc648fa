"""Paged attention in torch, on any device: the reference, and with its C++ kernel the fast path on a CPU.

The kernel computes a whole step in one call, except chunks of several tokens that exceed a sliding window. In torch,
chunks of length 1 (decodes) are computed together, padded to a common length, and longer chunks (prefills) one by one.
Padding repeats the row's newest token and is masked, so only a row's own pages are ever read for it.

    decode  row a  [k0 k1 k2 k3 k4]        with a window the gather begins at the first position that is seen
            row b  [k0 k1 k2 k2 k2]  <- masked repeats

Legend: T tokens of the step, C chunks, L gathered positions, n tokens of a chunk, N query heads, K key/value heads,
D head size, P pages, S page size, M = P S slots.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from model_runner.compute.attention import dense
from model_runner.compute.attention.base import AttentionBackend
from model_runner.compute.attention.dense import Scores
from model_runner.compute.attention.torch_plan import DecodeGather, GatherPlan, PrefillGather, make_plan
from model_runner.compute.kernels.cpu.functions.attention import supports
from model_runner.compute.kernels.cpu.functions.spec import Kernel, KernelKey
from model_runner.compute.kernels.cpu.kernels import KernelSet
from model_runner.compute.kernels.cpu.lookup import KernelLookup
from model_runner.config import ModelConfig
from model_runner.platform.device import dtype_name, upload
from model_runner.step.layout import Layout


@dataclass(frozen=True)
class TorchAttentionMetadata:
    """A step's metadata. `plans` has a plan for each window size, made at the first layer with this window."""

    layout: Layout
    slots_T: torch.Tensor
    plans: dict[int | None, GatherPlan] = field(default_factory=dict)


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
        """Returns the step's metadata. This backend has no static metadata, so `into` must be None."""
        assert into is None, "this backend has no static metadata"
        return TorchAttentionMetadata(layout, upload(layout.slots(), self._device))

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
            meta.plans[window] = make_plan(meta.layout, window, self._device, use_kernel=kernel is not None)
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
        self, q_CND: torch.Tensor, k_MKD: torch.Tensor, v_MKD: torch.Tensor, decode: DecodeGather, scores: Scores
    ) -> torch.Tensor:
        k = self._gather("k", k_MKD, decode.slots_CL)
        v = self._gather("v", v_MKD, decode.slots_CL)
        return dense.decode(q_CND, k, v, decode.seen_CL, scores)

    def _prefill(
        self, q_nND: torch.Tensor, k_MKD: torch.Tensor, v_MKD: torch.Tensor, prefill: PrefillGather, scores: Scores
    ) -> torch.Tensor:
        k, v = (cache.index_select(0, prefill.slots_L) for cache in (k_MKD, v_MKD))
        return dense.prefill(q_nND, k, v, prefill.seen_nL, scores)

    def _kernel(self, q_TND: torch.Tensor, k_cache_PSKD: torch.Tensor, scores: Scores) -> Kernel | None:
        """Returns the C++ kernel if it is built and supports these heads, this dtype and these scores, else None."""
        sizes = q_TND.shape[1], k_cache_PSKD.shape[2], q_TND.shape[2]
        if scores.softcap is not None or q_TND.dtype is not k_cache_PSKD.dtype or not supports(*sizes, q_TND.dtype):
            return None
        return self._kernels.get("attend", q_TND.dtype)

    def _gather(self, name: str, cache: torch.Tensor, slots_CL: torch.Tensor) -> torch.Tensor:
        """Gathers slots of the flat cache [P * S, K, D]; the result [C, K, L, D] is valid until the next gather with
        the same `name`.

        The buffer is reused, since allocating memory for every layer would cost a CPU four times as much time as the
        copy itself, in page faults.
        """
        size = slots_CL.numel() * cache[0].numel()
        buffer = self._buffers.get((name, cache.dtype))
        if buffer is None or buffer.numel() < size:
            buffer = torch.empty(size + size // 4, dtype=cache.dtype, device=cache.device)
            self._buffers[name, cache.dtype] = buffer
        gathered = buffer[:size].view(slots_CL.numel(), *cache.shape[1:])
        torch.index_select(cache, 0, slots_CL.flatten(), out=gathered)
        return gathered.view(*slots_CL.shape, *cache.shape[1:]).transpose(1, 2)
