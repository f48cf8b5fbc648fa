"""Computes the Capacity message: what a built runner can hold."""

from __future__ import annotations

import torch

from engine.config.process_configs import RunnerConfig
from engine.messages import Capacity
from model_runner.build.memory_plan import KvPlan
from model_runner.compute.attention import base as attention
from model_runner.lora.adapters import Adapters
from model_runner.lora.backends import base as lora_backends
from model_runner.lora.normal_form import lane_pages
from model_runner.lora.pool.site_pools import page_bytes
from model_runner.model.decoders.decoder import Decoder
from model_runner.platform.device import dtype_name, host_memory
from model_runner.step.kv_pool import KvPool

BATCHED_TOKENS = {"cpu": 512, "cuda": 8192}
"""The most tokens in a step if the config has no `max_batched_tokens`, by type of device."""


def batched_tokens(config: RunnerConfig, device: torch.device) -> int:
    """Returns the most tokens in a step."""
    return config.max_batched_tokens or BATCHED_TOKENS[device.type]


def capacity_of(config: RunnerConfig, decoder: Decoder, pool: KvPool, kv: KvPlan, lora: Adapters | None) -> Capacity:
    """Returns the Capacity with the sizes of these parts and the resolved backends."""
    device, dtype = decoder.weights.device, decoder.weights.dtype
    return Capacity(
        kv_pages=kv.pages,
        page_size=config.page_size,
        rows=kv.rows,
        max_length=kv.max_length,
        max_batched_tokens=batched_tokens(config, device),
        vocab_size=decoder.config.vocab_size,
        max_loras=config.max_loras if lora else 0,
        rank_pages=lora.pages.page_counts if lora else {},
        max_lora_rank=lora.fit.max_rank if lora else 0,
        max_lane_pages=lane_pages(lora.fit.max_rank) if lora else 0,
        device=device.type,
        dtype=dtype_name(dtype),
        attention_backend=attention.resolve(config.attention_backend, device),
        lora_backend=lora_backends.resolve(config.lora_backend, device),
        lora_targets=lora.fit.targets if lora else [],
        weight_bytes=decoder.weight_bytes,
        kv_bytes=pool.bytes,
        lora_bytes=lora.pages.bytes if lora else 0,
        rank_page_bytes=page_bytes(decoder.sites, lora.pages.dtype, lora.pages.extra_vocab) if lora else {},
        host_bytes=_host_bytes(lora, pool, device) if lora else 0,
    )


def _host_bytes(lora: Adapters, pool: KvPool, device: torch.device) -> int:
    """Returns the host memory for adapters in bytes: half of the free memory, counting start-up adapters as free.

    On a CPU the bytes of the pools are subtracted first: they are allocated, but not yet in physical memory.
    """
    pools = pool.bytes + lora.pages.bytes if device.type == "cpu" else 0
    return max(0, host_memory()[1] - pools + sum(adapter.bytes for adapter in lora.store)) // 2
