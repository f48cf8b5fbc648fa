"""Derives the config of each process from ServerArgs and from the directories and sockets that the launcher resolved.

Flags are parsed in engine.config.flags, hub ids resolved in engine.hub.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from engine.config.api_keys import ApiKey, read_keys
from engine.config.cors import parse_cors
from engine.config.process_configs import (
    AdapterSource,
    Endpoints,
    ProcessConfigs,
    RunnerConfig,
    SchedulerConfig,
    TokenizerConfig,
)
from engine.config.server_args import ServerArgs, served_names
from engine.config.sizes import has_unit, machine_bytes, parse_bytes
from engine.config.tenant_weights import parse_weights
from engine.errors import ConfigError
from engine.lora_roots import allowed_roots

LEAST_REQUEST_MEMORY = 16 << 20


def resolve(
    args: ServerArgs,
    *,
    endpoints: Endpoints,
    model: Path,
    tokenizer: Path | None = None,
    adapters: list[AdapterSource],
    listen_fd: int | None,
    journal: Sequence[int] = (),
) -> ProcessConfigs:
    """Returns the configs of the three processes. `tokenizer` None: the tokenizer files are in the model's directory.
    `listen_fd` and `journal` are descriptors that the tokenizer process inherits.

    Raises ConfigError for a size, weight or key that cannot be parsed.
    """
    enable_lora = _is_lora_enabled(args, adapters)
    shared: dict[str, Any] = {
        "endpoints": endpoints,
        "log_level": args.log_level,
        "adapters": adapters,
        "max_loras": args.max_loras_per_batch if enable_lora else 0,
    }
    return ProcessConfigs(
        tokenizer=_tokenizer_config(
            args,
            model_path=str(model),
            tokenizer_path=str(tokenizer or model),
            journal=list(journal),
            listen_fd=listen_fd,
            enable_lora=enable_lora,
            **shared,
        ),
        scheduler=_scheduler_config(args, **shared),
        runner=_runner_config(args, model_path=str(model), enable_lora=enable_lora, **shared),
    )


def _tokenizer_config(args: ServerArgs, *, max_loras: int, **resolved: Any) -> TokenizerConfig:
    api_keys = read_keys(args.api_key, args.api_key_file)
    return TokenizerConfig(
        max_loras=max_loras,
        served_model_names=served_names(args),
        chat_template=args.chat_template,
        seed=args.seed,
        max_pinned=max(0, max_loras - 1),
        priorities=args.schedule_policy == "priority",
        runtime_loads=args.allow_runtime_lora_updating or _is_loopback(args),
        max_open_requests=args.max_open_requests,
        max_queued_tokens=args.max_queued_tokens,
        request_timeout=args.request_timeout,
        max_stream_buffer=parse_bytes(args.max_stream_buffer, "--max-stream-buffer"),
        stream_stall_timeout=args.stream_stall_timeout,
        max_request_memory=_request_memory(args.max_request_memory),
        read_timeout=args.read_timeout,
        max_connections=args.max_connections,
        max_connections_per_address=args.max_connections_per_address,
        api_keys=api_keys,
        admin_key=args.admin_api_key,
        cors=parse_cors(args.allowed_origins, args.allowed_methods, args.allowed_headers, args.allow_credentials),
        metrics_rights=_metrics_rights(args, api_keys),
        allowed_hosts=args.allowed_hosts,
        lora_roots=allowed_roots(args.lora_root),
        lora_resolve_root=args.lora_resolve_root,
        server_info=_server_info(args),
        **resolved,
    )


def _scheduler_config(args: ServerArgs, **resolved: Any) -> SchedulerConfig:
    return SchedulerConfig(
        window=1 if args.disable_overlap_schedule else 2,
        max_loaded_loras=args.max_loaded_loras,
        lora_host_bytes=parse_bytes(args.lora_host_memory, "--lora-host-memory") if args.lora_host_memory else None,
        eviction_policy=args.lora_eviction_policy,
        lora_max_wait=args.lora_max_wait,
        schedule_policy=args.schedule_policy,
        tenant_weights=parse_weights(args.tenant_weights, "--tenant-weights"),
        max_prefill_tokens=args.max_prefill_tokens,
        prefix_cache=not args.disable_radix_cache,
        **resolved,
    )


def _runner_config(args: ServerArgs, **resolved: Any) -> RunnerConfig:
    pool_adapters, pool_bytes = _lora_pool_size(args.lora_pool_size)
    return RunnerConfig(
        served_model_names=served_names(args),
        device=args.device,
        dtype=args.dtype,
        attention_backend=args.attention_backend,
        cpu_kernels=args.cpu_kernels,
        cpu_threads=args.cpu_threads,
        tp_size=args.tp_size,
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
        **resolved,
    )


def _is_lora_enabled(args: ServerArgs, adapters: list[AdapterSource]) -> bool:
    """Returns --enable-lora; where it is not given, whether adapters or a flag that needs adapters are given."""
    if args.enable_lora is not None:
        return args.enable_lora
    flags = (args.max_lora_rank, args.lora_target_modules, args.lora_pool_size, args.lora_resolve_root)
    return bool(adapters) or any(flag is not None for flag in flags)


def _is_loopback(args: ServerArgs) -> bool:
    """Returns whether the server listens on a loopback address only, so that only this machine can connect."""
    return args.port is None or args.host in ("localhost", "::1") or args.host.startswith("127.")


def _request_memory(size: str | None) -> int:
    """Returns --max-request-memory in bytes; without it 2 GiB, or an eighth of the memory where that is less."""
    if size is None:
        return min(2 << 30, machine_bytes() // 8)
    given = parse_bytes(size, "--max-request-memory")
    if given < LEAST_REQUEST_MEMORY:
        raise ConfigError(f"--max-request-memory {size}: must be at least {LEAST_REQUEST_MEMORY >> 20}MiB")
    return given


def _metrics_rights(args: ServerArgs, api_keys: list[ApiKey]) -> Literal["open", "hide-adapters", "operator"]:
    """Returns --metrics-rights; `auto` hides adapters' names where calls without a key cannot list them either."""
    if args.metrics_rights == "auto":
        return "hide-adapters" if api_keys else "open"
    return args.metrics_rights


def _lora_pool_size(size: str | None) -> tuple[int | None, int | None]:
    """Returns --lora-pool-size as (adapters, bytes); at most one of the two is not None."""
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
