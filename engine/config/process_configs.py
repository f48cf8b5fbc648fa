"""What each process reads: its section, resolved once by the launcher and frozen.

Paths in the sections are local directories. Knows nothing of argv (engine.config.flags) nor of the hub (engine.hub).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import msgspec

from engine.config.api_keys import ApiKey, read_keys
from engine.config.server_args import CpuKernels, Dtype, LogLevel, ServerArgs, served_names
from engine.config.sizes import has_unit, parse_bytes
from engine.config.tenant_weights import parse_weights
from engine.errors import ConfigError


class AdapterSource(msgspec.Struct, frozen=True, kw_only=True):
    """An adapter given at start.

    `path` is as given, `root` the resolved directory, `base` the name of the model it says it belongs to.
    """

    adapter_id: int
    name: str
    path: str
    root: str
    pinned: bool = False
    base: str | None = None


class Endpoints(msgspec.Struct, frozen=True, kw_only=True):
    """Where this process's inbox is bound and where its neighbours' are now; `epoch` is its incarnation, from 0."""

    epoch: int = 0
    tokenizer: str
    scheduler: str
    runner: str
    zmq_server: str
    max_frame_bytes: int = 64 << 20


class TokenizerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The tokenizer/API process. `listen_fd` is the launcher's listening socket, None = no HTTP (embedded).

    Tokenizer and chat template are read from `tokenizer_path`, generation_config.json from `model_path`.
    `runtime_loads`: adapters may be loaded over HTTP without `admin_key`. With `lora_roots` the real path of every
    adapter file must lie under one of them or the hub cache. `priorities`: requests may have one other than 0.
    `journal` is where it writes what adapters become. `max_stream_buffer`: bytes that may wait for one client, who has
    `stream_stall_timeout` seconds to take some.
    """

    endpoints: Endpoints
    model_path: str
    tokenizer_path: str
    served_model_names: list[str]
    chat_template: str | None = None
    adapters: list[AdapterSource] = []
    enable_lora: bool = False
    max_loras: int = 0
    listen_fd: int | None = None
    seed: int | None = None
    log_level: LogLevel = "info"
    max_pinned: int = 0
    priorities: bool = False
    runtime_loads: bool = False
    api_keys: list[ApiKey] = []
    admin_key: str | None = None
    lora_roots: list[str] = []
    lora_resolve_root: str | None = None
    journal: str | None = None
    max_open_requests: int = 4096
    max_queued_tokens: int | None = None
    request_timeout: float | None = None
    max_body_bytes: int = 32 << 20
    max_stream_buffer: int = 4 << 20
    stream_stall_timeout: float = 60.0
    server_info: dict[str, str | int | float | bool | None] = {}


class SchedulerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The scheduler process. `window` is how many steps may be in flight; `prefix_cache`: prefixes are computed once.

    `lora_max_wait`: for how many seconds a request may be passed because of its adapter. `max_prefill_tokens`: in a
    step in which somebody decodes, None: a quarter of the runner's `max_batched_tokens`. `tenant_weights`: shares under
    the policy fair, 1 for who is not named.
    `max_loaded_loras` and `lora_host_bytes` bound the host tier (None: no count, and what the runner's capacity says).
    """

    endpoints: Endpoints
    max_loras: int = 0
    window: int = 2
    max_loaded_loras: int | None = None
    lora_host_bytes: int | None = None
    eviction_policy: Literal["lru", "fifo"] = "lru"
    lora_max_wait: float = 5.0
    schedule_policy: Literal["fcfs", "priority", "fair"] = "fcfs"
    tenant_weights: dict[str, float] = {}
    max_prefill_tokens: int | None = None
    prefix_cache: bool = True
    adapters: list[AdapterSource] = []
    log_level: LogLevel = "info"


class RunnerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """One rank of the model runner. `adapters` are loaded first: they size the pools when no flag does.

    `max_lora_rank` and `lora_targets` None mean: inferred from `adapters` (without any: 64 and all sites).
    `lora_extra_vocab`: tokens that an adapter may have beyond the base's, None: as many as one of `adapters` has.
    The pool holds `lora_pool_adapters` of the largest rank, or `lora_pool_bytes`; both None: by memory.
    Decode steps of up to `cuda_graph_max_rows` rows (None: 256) are captured on CUDA, unless `cuda_graphs` is off.
    `cpu_kernels`: compile C++ for a CPU; auto means in bfloat16, beside the serving; on: before it.
    `cpu_threads` None means: OMP_NUM_THREADS, or all cores up to four, then all but one.
    `device` auto means: cuda where there is one. `max_batched_tokens` None means: 512 on a CPU, 8192 on CUDA.
    `max_running_requests` and `max_total_tokens` None mean: from memory; `context_length` None: the model's.
    `after_fault`: the incarnation before ended by itself, perhaps because of what it was asked to do.
    """

    endpoints: Endpoints
    model_path: str
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Dtype = "auto"
    rank: int = 0
    tp_size: int = 1
    attention_backend: str = "auto"
    cpu_kernels: CpuKernels = "off"
    cpu_threads: int | None = None
    enable_lora: bool = False
    lora_backend: str = "auto"
    max_lora_chunk_size: int = 16
    lora_dtype: Dtype = "auto"
    max_loras: int = 8
    max_lora_rank: int | None = None
    lora_pool_adapters: int | None = None
    lora_pool_bytes: int | None = None
    lora_targets: list[str] | None = None
    lora_biases: bool = True
    lora_extra_vocab: int | None = None
    adapters: list[AdapterSource] = []
    max_batched_tokens: int | None = None
    max_running_requests: int | None = None
    mem_fraction: float = 0.9
    context_length: int | None = None
    page_size: int = 16
    max_total_tokens: int | None = None
    cuda_graphs: bool = True
    cuda_graph_max_rows: int | None = None
    seed: int = 0
    after_fault: bool = False
    log_level: LogLevel = "info"


class ProcessConfigs(msgspec.Struct, frozen=True, kw_only=True):
    """One launch, resolved: what each process will read."""

    tokenizer: TokenizerConfig
    scheduler: SchedulerConfig
    runner: RunnerConfig


def sections(
    args: ServerArgs,
    *,
    endpoints: Endpoints,
    journal: Path,
    model: Path,
    tokenizer: Path | None = None,
    adapters: list[AdapterSource],
    listen_fd: int | None,
) -> ProcessConfigs:
    """Every process's section, from the flags and what was resolved: directories, addresses, the listening socket.

    `tokenizer` None: the tokenizer files are the model's.
    """
    enable_lora = bool(adapters) if args.enable_lora is None else args.enable_lora
    if args.enable_lora is None and _means_lora(args):
        enable_lora = True
    max_loras = args.max_loras_per_batch if enable_lora else 0
    shared: dict[str, Any] = {
        "endpoints": endpoints,
        "log_level": args.log_level,
        "adapters": adapters,
        "max_loras": max_loras,
    }
    texts = TokenizerConfig(
        model_path=str(model),
        tokenizer_path=str(tokenizer or model),
        served_model_names=served_names(args),
        chat_template=args.chat_template,
        enable_lora=enable_lora,
        listen_fd=listen_fd,
        seed=args.seed,
        max_pinned=max(0, max_loras - 1),
        priorities=args.schedule_policy == "priority",
        runtime_loads=args.allow_runtime_lora_updating or _is_loopback(args),
        max_open_requests=args.max_open_requests,
        max_queued_tokens=args.max_queued_tokens,
        request_timeout=args.request_timeout,
        max_stream_buffer=parse_bytes(args.max_stream_buffer, "--max-stream-buffer"),
        stream_stall_timeout=args.stream_stall_timeout,
        api_keys=read_keys(args.api_key, args.api_key_file),
        admin_key=args.admin_api_key,
        lora_roots=[str(Path(root).expanduser().resolve()) for root in args.lora_root],
        lora_resolve_root=args.lora_resolve_root,
        journal=str(journal),
        server_info=_server_info(args),
        **shared,
    )
    scheduler = SchedulerConfig(
        window=1 if args.disable_overlap_schedule else 2,
        max_loaded_loras=args.max_loaded_loras,
        lora_host_bytes=parse_bytes(args.lora_host_memory, "--lora-host-memory") if args.lora_host_memory else None,
        eviction_policy=args.lora_eviction_policy,
        lora_max_wait=args.lora_max_wait,
        schedule_policy=args.schedule_policy,
        tenant_weights=parse_weights(args.tenant_weights, "--tenant-weights"),
        max_prefill_tokens=args.max_prefill_tokens,
        prefix_cache=not args.disable_radix_cache,
        **shared,
    )
    pool_adapters, pool_bytes = _pool(args.lora_pool_size)
    runner = RunnerConfig(
        model_path=str(model),
        device=args.device,
        dtype=args.dtype,
        attention_backend=args.attention_backend,
        cpu_kernels=args.cpu_kernels,
        cpu_threads=args.cpu_threads,
        tp_size=args.tp_size,
        enable_lora=enable_lora,
        lora_backend=args.lora_backend,
        max_lora_chunk_size=args.max_lora_chunk_size,
        lora_dtype=args.lora_dtype,
        max_lora_rank=args.max_lora_rank,
        lora_targets=args.lora_target_modules,
        lora_biases=args.enable_lora_bias,
        lora_extra_vocab=args.lora_extra_vocab_size,
        lora_pool_adapters=pool_adapters,
        lora_pool_bytes=pool_bytes,
        max_batched_tokens=args.max_num_batched_tokens,
        max_running_requests=args.max_running_requests,
        mem_fraction=args.mem_fraction_static,
        context_length=args.context_length,
        cuda_graphs=not args.disable_cuda_graph,
        cuda_graph_max_rows=args.cuda_graph_max_bs,
        page_size=args.page_size,
        max_total_tokens=args.max_total_tokens,
        seed=args.seed or 0,
        **shared,
    )
    return ProcessConfigs(tokenizer=texts, scheduler=scheduler, runner=runner)


def _means_lora(args: ServerArgs) -> bool:
    """Whether a flag makes sense only with adapters."""
    flags = (args.max_lora_rank, args.lora_target_modules, args.lora_pool_size, args.lora_resolve_root)
    return any(flag is not None for flag in flags)


def _is_loopback(args: ServerArgs) -> bool:
    """Whether only this machine can connect."""
    return args.port is None or args.host in ("localhost", "::1") or args.host.startswith("127.")


def _pool(size: str | None) -> tuple[int | None, int | None]:
    """--lora-pool-size as (adapters, bytes), one of them or none."""
    if size is None:
        return None, None
    if has_unit(size):
        return None, parse_bytes(size, "--lora-pool-size")
    if int(size) < 1:
        raise ConfigError(f"--lora-pool-size {size}: must hold at least one adapter")
    return int(size), None


def _server_info(args: ServerArgs) -> dict[str, str | int | float | bool | None]:
    shown = {**msgspec.to_builtins(args), "api_key": None, "admin_api_key": None}
    return {name: value if not isinstance(value, list) else ", ".join(value) for name, value in shown.items()}
