"""Builds the parts of a runner from its config, in the order in which their sizes become known.

config -> device, model config, dtype -> weights -> start-up adapters -> largest rank, targets -> rank pages
                                                 -> free memory -> KV pages, rows
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.config.process_configs import RunnerConfig
from engine.messages import Capacity
from engine.processes.busy_timer import BusyTimer
from model_runner.build import memory_plan
from model_runner.build.capacity import batched_tokens, capacity_of
from model_runner.build.startup_adapters import build_adapters
from model_runner.compute.attention import base as attention
from model_runner.compute.attention.base import AttentionBackend
from model_runner.compute.kernels.cpu import kernels as cpu_kernels
from model_runner.compute.kernels.cpu.kernel_user import KernelUser
from model_runner.compute.kernels.cpu.kernels import KernelSet
from model_runner.compute.sampler.sampler import Sampler
from model_runner.config import ModelConfig, read_model_config
from model_runner.cuda_graphs.decode_graphs import DecodeGraphs
from model_runner.cuda_graphs.primitives import capture_for
from model_runner.lora.adapters import Adapters
from model_runner.lora.backends.base import LoraBackend
from model_runner.model.decoders.decoder import Decoder
from model_runner.model.load import load_model
from model_runner.platform.device import device_memory, dtype_name, resolve_device, resolve_dtype
from model_runner.platform.shard import Shard
from model_runner.quantization import base as quantization
from model_runner.step import kv_pool
from model_runner.step.kv_pool import KvPool
from model_runner.step.rows import RowTable

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Parts:
    """All parts of a runner. `lora` is None without LoRA, `graphs` is None if no CUDA graphs are captured."""

    device: torch.device
    dtype: torch.dtype
    decoder: Decoder
    attention: AttentionBackend
    pool: KvPool
    lora: Adapters | None
    rows: RowTable
    sampler: Sampler
    capacity: Capacity
    kernels: KernelSet
    graphs: DecodeGraphs | None = None


def assemble(config: RunnerConfig, *, progress: BusyTimer | None) -> Parts:
    """Creates all parts and connects them. Raises ConfigError or AdapterError, whose one line says what to change."""
    device, model_config = resolve_device(config.device), read_model_config(Path(config.model_path))
    dtype = resolve_dtype(config.dtype, model_config.dtype, device)
    kernels = KernelSet(cpu_kernels.resolve(config.cpu_kernels, device, dtype), log_level=config.log_level)
    model_config = model_config.serving(memory_plan.resolve_length(model_config.max_length, config.context_length))
    decoder = _load_decoder(config, model_config, device, dtype, progress=progress)
    lora = build_adapters(config, decoder.sites, dtype, device, progress=progress) if config.enable_lora else None
    kv = _plan_kv(config, model_config, dtype, device)
    pool = KvPool(model_config, kv.pages, config.page_size, dtype, device, decoder.weights.shard)
    backend = attention.create(attention.resolve(config.attention_backend, device), device)
    decoder.attach(backend, pool, lora.backend if lora else None)
    rows = RowTable(kv.rows, -(-kv.max_length // config.page_size), config.page_size, device)
    sampler = Sampler(kv.rows, model_config.vocab_size + (lora.pages.extra_vocab if lora else 0), device)
    capacity = capacity_of(config, decoder, pool, kv, lora)
    graphs = _create_graphs(config, decoder, backend, lora, rows)
    _request_kernels(kernels, [decoder.weights.ops, backend, *([lora.backend] if lora else [])], decoder, progress)
    return Parts(device, dtype, decoder, backend, pool, lora, rows, sampler, capacity, kernels, graphs)


def _load_decoder(
    config: RunnerConfig,
    model_config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    *,
    progress: BusyTimer | None,
) -> Decoder:
    path, shard = Path(config.model_path), Shard(config.rank, config.tp_size)
    method = quantization.resolve(dtype, device)
    decoder = load_model(path, model_config, device=device, dtype=dtype, shard=shard, method=method, progress=progress)
    if device.type == "cpu":
        log.info("linears on this CPU: %s, %s", dtype_name(dtype), method)
    return decoder


def _plan_kv(
    config: RunnerConfig, model_config: ModelConfig, dtype: torch.dtype, device: torch.device
) -> memory_plan.KvPlan:
    """Plans the KV cache for the memory that is free now, except what activations and graphs need."""
    shard = Shard(config.rank, config.tp_size)
    total, free = device_memory(device)
    reserved = _reserved_bytes(config, model_config, dtype, device)
    return memory_plan.plan_kv(
        memory_plan.kv_budget(device.type, total, free, config.mem_fraction, reserved),
        kv_pool.page_bytes(model_config, config.page_size, dtype, shard),
        config.page_size,
        length=memory_plan.resolve_length(model_config.max_length, config.context_length),
        asked_length=config.context_length,
        asked_rows=config.max_running_requests,
        asked_tokens=config.max_total_tokens,
    )


def _reserved_bytes(config: RunnerConfig, model_config: ModelConfig, dtype: torch.dtype, device: torch.device) -> int:
    """Returns the bytes to keep free for activations and CUDA graphs."""
    rows, tokens = config.max_running_requests or memory_plan.MAX_ROWS, batched_tokens(config, device)
    hidden, widest = model_config.hidden_size, model_config.widest
    reserved = memory_plan.activation_margin(tokens, rows, hidden, widest, model_config.vocab_size, dtype.itemsize)
    if config.cuda_graphs:
        sizes = memory_plan.graph_sizes(rows, config.cuda_graph_max_rows)
        reserved += memory_plan.graph_bytes(sizes, 2 if config.enable_lora else 1, hidden, widest, dtype.itemsize)
    return reserved


def _create_graphs(
    config: RunnerConfig, decoder: Decoder, backend: AttentionBackend, lora: Adapters | None, rows: RowTable
) -> DecodeGraphs | None:
    """Creates the CUDA graphs of decode steps, to be captured later.

    Returns None if the config or the device excludes graphs, or the decoder or a backend cannot be captured.
    """
    capture = capture_for(decoder.weights.device) if config.cuda_graphs else None
    if capture is None:
        return None
    if not decoder.capturable:
        log.warning("no CUDA graphs: this model's experts wait for the device here (in bfloat16 on Hopper they do not)")
        return None
    backends: list[AttentionBackend | LoraBackend] = [backend, lora.backend] if lora else [backend]
    for one in backends:
        try:
            one.static(1)
        except NotImplementedError as reason:
            log.warning("no CUDA graphs: %s", reason)
            return None
    sizes = memory_plan.graph_sizes(rows.scratch, config.cuda_graph_max_rows)
    return DecodeGraphs(decoder, backend, lora.backend if lora else None, rows, sizes, capture)


def _request_kernels(kernels: KernelSet, users: list[KernelUser], decoder: Decoder, progress: BusyTimer | None) -> None:
    """Gives all users of kernels the KernelSet, and requests the compilation of the kernels that they use."""
    for user in users:
        user.use_kernels(kernels)
    wanted = [key for user in users for key in user.wanted_kernels(decoder.config, decoder.weights.dtype)]
    kernels.request(wanted, progress=progress)
