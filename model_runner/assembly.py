"""Puts a runner's parts together from its config: the order in which sizes become known.

    config -> device, model_config, dtype -> weights -> start-up adapters -> largest rank, targets -> rank pages
                                             -> what memory is left -> KV pages, rows

Knows nothing of steps.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from tqdm import tqdm

from engine.config.sections import AdapterSource, RunnerConfig
from engine.errors import ConfigError
from engine.messages import Capacity
from model_runner import memory_plan
from model_runner.compute.attention import base as attention
from model_runner.compute.attention.base import AttentionBackend
from model_runner.compute.kernels.cpu import kernels as cpu_kernels
from model_runner.compute.kernels.cpu.kernel_user import KernelUser
from model_runner.compute.kernels.cpu.kernels import KernelSet
from model_runner.compute.sampler.sampler import Sampler
from model_runner.config import ModelConfig, read_model_config
from model_runner.graphs import DecodeGraphs
from model_runner.lora.adapters import Adapters
from model_runner.lora.backends import base as lora_backends
from model_runner.lora.backends.base import LoraBackend
from model_runner.lora.normal_form import NormalForm, lane_pages
from model_runner.lora.peft.survey import AdapterSurvey
from model_runner.lora.pool.fills import FillQueue
from model_runner.lora.pool.pages import RankPagePool
from model_runner.lora.pool.site_pools import page_bytes
from model_runner.lora.site import EMBED, EXPERTS, HEAD, NORMS, Site
from model_runner.lora.store import AdapterStore
from model_runner.lora.transfer.loaders import Loaders
from model_runner.lora.transfer.messages import LoaderConfig, SiteShape
from model_runner.lora.transfer.reader import Limits
from model_runner.model.families.decoder import Decoder
from model_runner.model.load import load_model
from model_runner.platform.device import DTYPES, device_memory, dtype_name, host_memory, resolve_device, resolve_dtype
from model_runner.platform.shard import Shard
from model_runner.quantization import base as quantization
from model_runner.step import kv_pool
from model_runner.step.capture import capture_for
from model_runner.step.kv_pool import KvPool
from model_runner.step.rows import RowTable

log = logging.getLogger(__name__)

DEFAULT_LORA_RANK = 64
LARGE = (EMBED, HEAD, EXPERTS)  # groups whose pages are made only where a start-up adapter or the flag names them
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
    kernels: KernelSet
    graphs: DecodeGraphs | None = None


def assemble(config: RunnerConfig, *, progress: bool) -> Parts:
    """All parts, attached to one another. Raises ConfigError or AdapterError, one line that says what to change."""
    path, shard = Path(config.model_path), Shard(config.rank, config.tp_size)
    device, model_config = resolve_device(config.device), read_model_config(path)
    dtype = resolve_dtype(config.dtype, model_config.dtype, device)
    kernels = KernelSet(cpu_kernels.resolve(config.cpu_kernels, device, dtype), log_level=config.log_level)
    length = memory_plan.resolve_length(model_config.max_length, config.context_length)
    model_config = model_config.serving(length)
    method = quantization.resolve(dtype, device)
    decoder = load_model(path, model_config, device=device, dtype=dtype, shard=shard, method=method, progress=progress)
    if device.type == "cpu":
        log.info("linears on this CPU: %s, %s", dtype_name(dtype), method)
    lora = _lora(config, decoder.sites, dtype, device, progress=progress) if config.enable_lora else None
    kv = _plan_kv(
        config, model_config, kv_pool.page_bytes(model_config, config.page_size, dtype, shard), length, dtype, device
    )
    pool = KvPool(model_config, kv.pages, config.page_size, dtype, device, shard)
    backend = attention.create(attention.resolve(config.attention_backend, device), device)
    decoder.attach(backend, pool, lora.backend if lora else None)
    rows = RowTable(kv.rows, -(-kv.max_length // config.page_size), config.page_size, device)
    sampler = Sampler(kv.rows, model_config.vocab_size + (lora.pages.extra_vocab if lora else 0), device)
    capacity = _capacity(config, model_config, device, dtype, decoder, pool, kv, lora)
    graphs = _graphs(config, decoder, backend, lora, rows, device)
    kernel_users: list[KernelUser] = [decoder.weights.ops, backend, *([lora.backend] if lora else [])]
    for user in kernel_users:
        user.use_kernels(kernels)
    kernels.request(
        [key for user in kernel_users for key in user.wanted_kernels(model_config, dtype)], progress=progress
    )
    return Parts(device, dtype, decoder, backend, pool, lora, rows, sampler, capacity, kernels, graphs)


def _graphs(
    config: RunnerConfig,
    decoder: Decoder,
    backend: AttentionBackend,
    lora: Adapters | None,
    rows: RowTable,
    device: torch.device,
) -> DecodeGraphs | None:
    """The decode steps to capture; None where the config or device does without, or a backend cannot be captured."""
    capture = capture_for(device) if config.cuda_graphs else None
    if capture is None:
        return None
    if not decoder.capturable:
        log.warning("no CUDA graphs: this model's experts wait for the device here (in bfloat16 on Hopper they do not)")
        return None
    seams: list[AttentionBackend | LoraBackend] = [backend, lora.backend] if lora else [backend]
    for seam in seams:
        try:
            seam.static(1)
        except NotImplementedError as reason:
            log.warning("no CUDA graphs: %s", reason)
            return None
    sizes = memory_plan.graph_sizes(rows.scratch, config.cuda_graph_max_rows)
    return DecodeGraphs(decoder, backend, lora.backend if lora else None, rows, sizes, capture)


def _batched_tokens(config: RunnerConfig, device: torch.device) -> int:
    return config.max_batched_tokens or BATCHED_TOKENS[device.type]


def _plan_kv(
    config: RunnerConfig,
    model_config: ModelConfig,
    page_size_bytes: int,
    length: int,
    dtype: torch.dtype,
    device: torch.device,
) -> memory_plan.KvPlan:
    total, free = device_memory(device)
    margin = memory_plan.activation_margin(
        _batched_tokens(config, device),
        config.max_running_requests or memory_plan.MAX_ROWS,
        model_config.hidden_size,
        model_config.widest,
        model_config.vocab_size,
        dtype.itemsize,
    )
    if config.cuda_graphs:
        sizes = memory_plan.graph_sizes(config.max_running_requests or memory_plan.MAX_ROWS, config.cuda_graph_max_rows)
        kinds = 2 if config.enable_lora else 1
        margin += memory_plan.graph_bytes(sizes, kinds, model_config.hidden_size, model_config.widest, dtype.itemsize)
    return memory_plan.plan_kv(
        memory_plan.kv_budget(device.type, total, free, config.mem_fraction, margin),
        page_size_bytes,
        config.page_size,
        length=length,
        asked_length=config.context_length,
        asked_rows=config.max_running_requests,
        asked_tokens=config.max_total_tokens,
    )


def _lora(
    config: RunnerConfig, sites: list[Site], dtype: torch.dtype, device: torch.device, *, progress: bool
) -> Adapters:
    """Loads the start-up adapters, then sizes the pools by the flags or, without them, by what was loaded."""
    modules = list(dict.fromkeys(piece.module for site in sites for piece in site.slices))
    linears = [piece.module for site in sites if site.group not in (*LARGE, NORMS) for piece in site.slices]
    _check_targets(config.lora_targets, modules)
    lora_dtype = dtype if config.lora_dtype == "auto" else DTYPES[config.lora_dtype]
    store = AdapterStore(
        sites,
        lora_dtype,
        max_rank=config.max_lora_rank,
        targets=config.lora_targets,
        biases=config.lora_biases,
        extra_vocab=config.lora_extra_vocab,
    )
    given = _load_given(config.adapters, store, progress=progress)
    inferred = max((max(1, one.rank) for one in given), default=DEFAULT_LORA_RANK)
    max_rank = config.max_lora_rank or inferred
    targets = _targets(config.lora_targets, {target for one in given for target in one.targets}, modules, linears)
    groups = _groups(sites, targets, set(config.lora_targets or ()), given)
    extra_vocab = max(config.lora_extra_vocab or 0, *(_added_tokens(one, sites) for one in given), 0)
    sizes = page_bytes(sites, lora_dtype, extra_vocab)
    room = memory_plan.pool_room(device.type, *device_memory(device), config.mem_fraction)
    wholes, room = memory_plan.plan_matrices(sizes, [one.footprint for one in given], config.max_loras, room)
    pages = memory_plan.plan_rank_pages(
        sizes,
        groups,
        max_rank=max_rank,
        default=config.max_loras,
        room=room,
        asked=memory_plan.PoolSize(config.lora_pool_adapters, config.lora_pool_bytes),
    )
    pages |= wholes
    rank_pages = RankPagePool(sites, pages, config.max_loras, lora_dtype, device, extra_vocab)
    options = lora_backends.Options(config.max_lora_chunk_size, lane_pages(max_rank))
    backend = lora_backends.create(lora_backends.resolve(config.lora_backend, device), rank_pages, options)
    names = {source.adapter_id: source.name for source in config.adapters}
    limits = msgspec.structs.replace(store.limits, extra_vocab=extra_vocab)
    loaders = Loaders(_loader_config(config, sites, lora_dtype, limits))
    lora = Adapters(store, loaders, rank_pages, FillQueue(rank_pages), backend, max_rank, targets, names)
    for source, one in zip(config.adapters, given, strict=True):
        lora.check_fits(source.name, one.rank, one.targets, one.footprint, one.vocab_size)
    return lora


def _added_tokens(one: NormalForm | AdapterSurvey, sites: list[Site]) -> int:
    """How many tokens more than the base the adapter has."""
    base = next(site.vocabulary for site in sites if site.group == EMBED)
    return max(0, one.vocab_size - base)


def _load_given(
    sources: list[AdapterSource], store: AdapterStore, *, progress: bool
) -> list[NormalForm | AdapterSurvey]:
    """Start-up adapters, into the host tier while half of the memory that is free holds them; the rest are checked."""
    room = host_memory()[1] // 2
    given: list[NormalForm | AdapterSurvey] = []
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
    shapes = [SiteShape.of(site) for site in sites]
    return LoaderConfig(shapes, name, limits, model=config.model_path, log_level=config.log_level)


def _check_targets(given: list[str] | None, modules: list[str]) -> None:
    unknown = [name for name in given or [] if name != "all" and name not in modules]
    if unknown:
        raise ConfigError(
            f"--lora-target-modules {' '.join(unknown)}: this model has no such module; it has {' '.join(modules)}"
        )


def _targets(given: list[str] | None, found: set[str], modules: list[str], linears: list[str]) -> list[str]:
    """The modules adapters may touch, in the model's order.

    "all" are the linears of the layers: pages of the embedding, the head and experts are large, so that they are made
    only where a start-up adapter or the flag names these modules.
    """
    wanted = found | set(given or ())
    if (given is None and not found) or "all" in wanted:
        wanted |= set(linears)
    return [module for module in modules if module in wanted]


def _groups(
    sites: list[Site], targets: list[str], named: set[str], given: list[NormalForm | AdapterSurvey]
) -> set[str]:
    """The groups of these targets, the large ones only where their rank pages are meant.

    Experts may be called as the linears of other layers are, and an adapter may bring a whole embedding or head.
    """
    groups = {site.group for site in sites if any(piece.module in targets for piece in site.slices)} - {NORMS}
    for large in LARGE:
        modules = {piece.module for site in sites if site.group == large for piece in site.slices}
        if not modules & named and not any(large in one.footprint.pages for one in given):
            groups.discard(large)
    return groups


def _capacity(
    config: RunnerConfig,
    model_config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    decoder: Decoder,
    pool: KvPool,
    kv: memory_plan.KvPlan,
    lora: Adapters | None,
) -> Capacity:
    return Capacity(
        kv_pages=kv.pages,
        page_size=config.page_size,
        rows=kv.rows,
        max_length=kv.max_length,
        max_batched_tokens=_batched_tokens(config, device),
        vocab_size=model_config.vocab_size,
        max_loras=config.max_loras if lora else 0,
        rank_pages=lora.pages.page_counts if lora else {},
        max_lora_rank=lora.max_rank if lora else 0,
        max_lane_pages=lane_pages(lora.max_rank) if lora else 0,
        device=device.type,
        dtype=dtype_name(dtype),
        attention_backend=attention.resolve(config.attention_backend, device),
        lora_backend=lora_backends.resolve(config.lora_backend, device),
        lora_targets=lora.targets if lora else [],
        weight_bytes=decoder.weight_bytes,
        kv_bytes=pool.bytes,
        lora_bytes=lora.pages.bytes if lora else 0,
        rank_page_bytes=page_bytes(decoder.sites, lora.pages.dtype, lora.pages.extra_vocab) if lora else {},
        host_bytes=_host_bytes(lora, pool, device) if lora else 0,
    )


def _host_bytes(lora: Adapters, pool: KvPool, device: torch.device) -> int:
    """Half of the host memory that is free, start-up adapters counted in; a CPU's pools are not yet touched."""
    pools = pool.bytes + lora.pages.bytes if device.type == "cpu" else 0
    return max(0, host_memory()[1] - pools + sum(adapter.bytes for adapter in lora.store)) // 2
