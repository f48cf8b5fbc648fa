"""Puts a runner's parts together from its config: the order in which sizes become known.

    config -> device, arch, dtype -> weights -> start-up adapters -> largest rank, targets -> rank pages
                                             -> what memory is left -> KV pages, rows

Knows nothing of steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from engine.config import AdapterSource, RunnerConfig
from engine.errors import ConfigError
from engine.messages import Capacity
from model_runner import kv_pool, memory
from model_runner.adapters import Adapters
from model_runner.arch import Arch, read_arch
from model_runner.attention import base as attention
from model_runner.attention.base import AttentionBackend
from model_runner.device import DTYPES, host_memory, resolve_device, resolve_dtype
from model_runner.device import memory as device_memory
from model_runner.kv_pool import KvPool
from model_runner.load.loaders import Loaders
from model_runner.load.messages import LoaderConfig, SiteShape
from model_runner.lora import base as lora_backends
from model_runner.lora.adapter import Adapter
from model_runner.lora.fills import Fills
from model_runner.lora.formats.peft import Survey
from model_runner.lora.pages import RankPages, page_bytes
from model_runner.lora.reader import Limits
from model_runner.lora.site import Site
from model_runner.lora.store import AdapterStore
from model_runner.models.decoder import Decoder
from model_runner.models.load import load_model
from model_runner.parallel import Shard
from model_runner.rows import RowTable
from model_runner.sampler.sampler import Sampler

DEFAULT_LORA_RANK = 64
MANY_ADAPTERS = 16  # at start: from here on a bar shows how far it is
BATCHED_TOKENS = {"cpu": 512, "cuda": 8192}


@dataclass(frozen=True)
class Parts:
    """A runner, taken apart."""

    device: torch.device
    dtype: torch.dtype
    decoder: Decoder
    attention: AttentionBackend
    pool: KvPool
    lora: Adapters | None
    rows: RowTable
    sampler: Sampler
    capacity: Capacity


def assemble(config: RunnerConfig, *, progress: bool) -> Parts:
    """All parts, attached to one another. Raises ConfigError or AdapterError, one line that says what to change."""
    path, shard = Path(config.model_path), Shard(config.rank, config.tp_size)
    device, arch = resolve_device(config.device), read_arch(path)
    dtype = resolve_dtype(config.dtype, arch.dtype, device)
    length = memory.resolve_length(arch.max_length, config.context_length)
    decoder = load_model(path, arch, device=device, dtype=dtype, shard=shard, progress=progress)
    lora = _lora(config, decoder.sites, dtype, device, progress=progress) if config.enable_lora else None
    kv = _plan_kv(config, arch, kv_pool.page_bytes(arch, config.page_size, dtype, shard), length, dtype, device)
    pool = KvPool(arch, kv.pages, config.page_size, dtype, device, shard)
    backend = attention.create("torch" if config.attention_backend == "auto" else config.attention_backend, device)
    decoder.attach(backend, pool, lora.backend if lora else None)
    rows = RowTable(kv.rows, -(-kv.max_length // config.page_size), config.page_size, device)
    sampler = Sampler(kv.rows, arch.vocab_size, device)
    capacity = _capacity(config, arch, device, dtype, decoder, pool, kv, lora)
    return Parts(device, dtype, decoder, backend, pool, lora, rows, sampler, capacity)


def _batched_tokens(config: RunnerConfig, device: torch.device) -> int:
    return config.max_batched_tokens or BATCHED_TOKENS[device.type]


def _plan_kv(
    config: RunnerConfig, arch: Arch, page_size_bytes: int, length: int, dtype: torch.dtype, device: torch.device
) -> memory.KvPlan:
    total, free = device_memory(device)
    margin = memory.activation_margin(
        _batched_tokens(config, device),
        config.max_running_requests or memory.MAX_ROWS,
        arch.hidden_size,
        arch.intermediate_size,
        arch.vocab_size,
        dtype.itemsize,
    )
    return memory.plan_kv(
        memory.kv_budget(device.type, total, free, config.mem_fraction, margin),
        page_size_bytes,
        config.page_size,
        length=length,
        asked_length=config.context_length,
        asked_rows=config.max_running_requests,
    )


def _lora(
    config: RunnerConfig, sites: list[Site], dtype: torch.dtype, device: torch.device, *, progress: bool
) -> Adapters:
    """Loads the start-up adapters, then sizes the pools by the flags or, without them, by what was loaded."""
    modules = list(dict.fromkeys(piece.module for site in sites for piece in site.slices))
    _check_targets(config.lora_targets, modules)
    lora_dtype = dtype if config.lora_dtype == "auto" else DTYPES[config.lora_dtype]
    store = AdapterStore(sites, lora_dtype, max_rank=config.max_lora_rank, targets=config.lora_targets)
    given = _load_given(config.adapters, store, progress=progress)
    max_rank = config.max_lora_rank or max((one.rank for one in given), default=DEFAULT_LORA_RANK)
    targets = _targets(config.lora_targets, {target for one in given for target in one.targets}, modules)
    groups = {site.group for site in sites if any(piece.module in targets for piece in site.slices)}
    pages = memory.plan_rank_pages(
        page_bytes(sites, lora_dtype),
        groups,
        max_rank=max_rank,
        default=config.max_loras,
        room=memory.pool_room(device.type, *device_memory(device), config.mem_fraction),
        asked=memory.PoolSize(config.lora_pool_adapters, config.lora_pool_bytes),
    )
    rank_pages = RankPages(sites, pages, config.max_loras, lora_dtype, device)
    backend = lora_backends.create("torch" if config.lora_backend == "auto" else config.lora_backend, rank_pages)
    names = {source.adapter_id: source.name for source in config.adapters}
    loaders = Loaders(_loader_config(config, sites, lora_dtype, store.limits))
    lora = Adapters(store, loaders, rank_pages, Fills(rank_pages), backend, max_rank, targets, names)
    for source, one in zip(config.adapters, given, strict=True):
        lora.check_fits(source.name, one.rank, one.targets, one.footprint)
    return lora


def _load_given(sources: list[AdapterSource], store: AdapterStore, *, progress: bool) -> list[Adapter | Survey]:
    """Start-up adapters, into the host tier while half of the memory that is free holds them; the rest are checked."""
    room = host_memory()[1] // 2
    given: list[Adapter | Survey] = []
    for source in tqdm(sources, "adapters", disable=not progress or len(sources) < MANY_ADAPTERS, leave=False):
        if room > 0:
            adapter = store.load(source.adapter_id, source.name, Path(source.root))
            room -= adapter.bytes
            given.append(adapter)
        else:
            given.append(store.survey(source.name, Path(source.root)))
    return given


def _loader_config(config: RunnerConfig, sites: list[Site], dtype: torch.dtype, limits: Limits) -> LoaderConfig:
    (name,) = (name for name, known in DTYPES.items() if known is dtype)
    return LoaderConfig([SiteShape.of(site) for site in sites], name, limits, log_level=config.log_level)


def _check_targets(given: list[str] | None, modules: list[str]) -> None:
    unknown = [name for name in given or [] if name != "all" and name not in modules]
    if unknown:
        raise ConfigError(
            f"--lora-target-modules {' '.join(unknown)}: this model has no such module; it has {' '.join(modules)}"
        )


def _targets(given: list[str] | None, found: set[str], modules: list[str]) -> list[str]:
    """The modules adapters may touch, in the model's order."""
    wanted = found if given is None else set(given)
    return modules if not wanted or "all" in wanted else [module for module in modules if module in wanted]


def _capacity(
    config: RunnerConfig,
    arch: Arch,
    device: torch.device,
    dtype: torch.dtype,
    decoder: Decoder,
    pool: KvPool,
    kv: memory.KvPlan,
    lora: Adapters | None,
) -> Capacity:
    return Capacity(
        kv_pages=kv.pages,
        page_size=config.page_size,
        rows=kv.rows,
        max_length=kv.max_length,
        max_batched_tokens=_batched_tokens(config, device),
        vocab_size=arch.vocab_size,
        max_loras=config.max_loras if lora else 0,
        rank_pages=lora.pages.pages if lora else {},
        max_lora_rank=lora.max_rank if lora else 0,
        max_lane_pages=memory.lane_pages(lora.max_rank) if lora else 0,
        device=device.type,
        dtype=str(dtype).removeprefix("torch."),
        attention_backend="torch" if config.attention_backend == "auto" else config.attention_backend,
        lora_backend="torch" if config.lora_backend == "auto" else config.lora_backend,
        lora_targets=lora.targets if lora else [],
        weight_bytes=decoder.weight_bytes,
        kv_bytes=pool.bytes,
        lora_bytes=lora.pages.bytes if lora else 0,
        rank_page_bytes=page_bytes(decoder.sites, lora.pages.dtype) if lora else {},
        host_bytes=_host_bytes(lora, pool, device) if lora else 0,
    )


def _host_bytes(lora: Adapters, pool: KvPool, device: torch.device) -> int:
    """Half of the host memory that is free, start-up adapters counted in; a CPU's pools are not yet touched."""
    pools = pool.bytes + lora.pages.bytes if device.type == "cpu" else 0
    return max(0, host_memory()[1] - pools + sum(adapter.bytes for adapter in lora.store)) // 2
