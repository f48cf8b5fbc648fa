"""Builds the LoRA part of a runner: loads the start-up adapters, then sizes the pools by the flags or these adapters.

A successor gets the sizes from its predecessor, as the files of adapters may be gone by then; it loads ahead what it
finds. The KV cache is sized later, from the memory that is left.
"""

from __future__ import annotations

import logging
from pathlib import Path

import msgspec
import torch
from tqdm import tqdm

from engine.config.process_configs import AdapterSource, LoraPoolSizes, RunnerConfig
from engine.errors import AdapterError
from engine.processes.busy_timer import BusyTimer
from model_runner.build import lora_plan
from model_runner.build.lora_targets import check_targets, expand, groups_of, resolve_targets
from model_runner.lora.adapters import Adapters
from model_runner.lora.backends import base as lora_backends
from model_runner.lora.backends.base import LoraBackend
from model_runner.lora.loading.loader_pool import LoaderPool
from model_runner.lora.loading.messages import LoaderConfig, SiteShape
from model_runner.lora.normal_form import NormalForm, lane_pages
from model_runner.lora.peft.survey import AdapterSurvey
from model_runner.lora.pool.fills import FillQueue
from model_runner.lora.pool.fit import PoolFit
from model_runner.lora.pool.pages import RankPagePool
from model_runner.lora.pool.site_pools import page_bytes
from model_runner.lora.site import EMBED, Site
from model_runner.lora.store import AdapterStore
from model_runner.platform.device import DTYPES, device_memory, dtype_name, host_memory

log = logging.getLogger(__name__)

DEFAULT_LORA_RANK = 64
MANY_ADAPTERS = 16  # a progress bar is shown for at least this many start-up adapters


def build_adapters(
    config: RunnerConfig, sites: list[Site], dtype: torch.dtype, device: torch.device, *, progress: BusyTimer | None
) -> Adapters:
    """Loads the start-up adapters into the host cache and creates pools for adapters of their sizes.

    Raises ConfigError or AdapterError.
    """
    config = msgspec.structs.replace(config, lora_targets=expand(config.lora_targets, sites))
    check_targets(config.lora_targets, sites)
    lora_dtype = dtype if config.lora_dtype == "auto" else DTYPES[config.lora_dtype]
    store = _create_store(config, sites, lora_dtype)
    if config.lora_pool:
        given = []
        _load_ahead(config.adapters, store, progress=progress)
    else:
        given = _load_given(config.adapters, store, progress=progress)
    sizes = config.lora_pool or _pool_sizes(config, sites, given, lora_dtype, device)
    max_rank, targets = sizes.max_rank, sizes.targets
    pages = RankPagePool(sites, sizes.pages, config.max_loras, lora_dtype, device, sizes.extra_vocab)
    backend = _create_backend(config, pages, max_rank)
    names = {source.adapter_id: source.name for source in config.adapters}
    flag = config.lora_targets or (targets if config.adapters else ["all"])
    loaders = LoaderPool(_loader_config(config, store, pages, flag))
    fit = PoolFit(pages, max_rank, targets, flag)
    lora = Adapters(store, loaders, pages, FillQueue(pages), backend, fit, names)
    for source, adapter in zip(config.adapters if given else [], given, strict=True):
        fit.check(source.name, source.root, adapter)
    return lora


def _create_store(config: RunnerConfig, sites: list[Site], dtype: torch.dtype) -> AdapterStore:
    return AdapterStore(
        sites,
        dtype,
        max_rank=config.max_lora_rank,
        targets=config.lora_targets,
        biases=config.lora_biases,
        extra_vocab=config.lora_extra_vocab,
        model=Path(config.model_path) if config.model_path else None,
        served_names=config.served_model_names,
    )


def _load_given(
    sources: list[AdapterSource], store: AdapterStore, *, progress: BusyTimer | None
) -> list[NormalForm | AdapterSurvey]:
    """Loads start-up adapters into the host cache, up to half of the free memory, and checks the others."""
    room = host_memory()[1] // 2
    given: list[NormalForm | AdapterSurvey] = []
    for source in tqdm(sources, "adapters", disable=progress is None or len(sources) < MANY_ADAPTERS, leave=False):
        if progress is not None:
            progress.tick()
        if room > 0:
            adapter = store.load(source.adapter_id, source.name, Path(source.root), roots=source.roots)
            room -= adapter.bytes
            given.append(adapter)
        else:
            given.append(store.survey(source.name, Path(source.root), source.roots))
    return given


def _load_ahead(sources: list[AdapterSource], store: AdapterStore, *, progress: BusyTimer | None) -> None:
    """Loads those of the adapters that can be loaded into the host cache, up to half of the free memory."""
    room = host_memory()[1] // 2
    for source in sources:
        if progress is not None:
            progress.tick()
        if room > 0:
            try:
                room -= store.load(source.adapter_id, source.name, Path(source.root), roots=source.roots).bytes
            except AdapterError as error:
                log.warning("%s; the runner starts without it", error.message)


def _pool_sizes(
    config: RunnerConfig,
    sites: list[Site],
    given: list[NormalForm | AdapterSurvey],
    dtype: torch.dtype,
    device: torch.device,
) -> LoraPoolSizes:
    """Returns the sizes of a pool with the rank pages and slots that the flags and the adapters `given` ask for."""
    inferred = max((max(1, adapter.rank) for adapter in given), default=DEFAULT_LORA_RANK)
    max_rank = config.max_lora_rank or inferred
    targets = resolve_targets(config.lora_targets, given, sites)
    extra_vocab = max(config.lora_extra_vocab or 0, *(_added_tokens(adapter, sites) for adapter in given), 0)
    sizes = page_bytes(sites, dtype, extra_vocab)
    room = lora_plan.pool_room(device.type, *device_memory(device), config.mem_fraction)
    footprints = [adapter.footprint for adapter in given]
    full_weights, room = lora_plan.plan_full_weights(sizes, footprints, config.max_loras, room)
    counts = lora_plan.plan_rank_pages(
        sizes,
        groups_of(targets, set(config.lora_targets or ()), given, sites),
        max_rank=max_rank,
        default=config.max_loras,
        room=room,
        asked=lora_plan.PoolSize(config.lora_pool_adapters, config.lora_pool_bytes),
    )
    return LoraPoolSizes(max_rank, targets, counts | full_weights, extra_vocab)


def _create_backend(config: RunnerConfig, pages: RankPagePool, max_rank: int) -> LoraBackend:
    options = lora_backends.Options(config.max_lora_chunk_size, lane_pages(max_rank))
    return lora_backends.create(lora_backends.resolve(config.lora_backend, pages.device), pages, options)


def _loader_config(config: RunnerConfig, store: AdapterStore, pages: RankPagePool, flag: list[str]) -> LoaderConfig:
    """Returns the config of loader processes: the sites, the limits from the flags, and those of the pool."""
    empty = sorted({site.group for site in pages.sites if not pages.page_counts.get(site.group)})
    limits = msgspec.structs.replace(store.limits, extra_vocab=pages.extra_vocab, empty_groups=empty, flag=flag)
    shapes = [SiteShape.of(site) for site in pages.sites]
    name = dtype_name(pages.dtype)
    return LoaderConfig(
        shapes,
        name,
        limits,
        model=config.model_path,
        served_names=config.served_model_names,
        log_level=config.log_level,
    )


def _added_tokens(adapter: NormalForm | AdapterSurvey, sites: list[Site]) -> int:
    """Returns how many tokens the adapter's vocabulary has beyond the base's."""
    base = next(site.vocabulary for site in sites if site.group == EMBED)
    return max(0, adapter.vocab_size - base)
