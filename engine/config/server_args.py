"""ServerArgs: one field for each flag, with the flag's default. The values are checked on construction.

The command line is parsed in engine.config.flags; values are derived from the flags in engine.config.resolve.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

import msgspec

from engine.errors import ConfigError

LogLevel = Literal["debug", "info", "warning", "error"]
Dtype = Literal["auto", "bfloat16", "float16", "float32"]
CpuKernels = Literal["auto", "on", "off"]

_HOST = re.compile(r"\*|(\*\.)?[0-9A-Za-z_-]+(\.[0-9A-Za-z_-]+)*\.?|\[[0-9A-Fa-f:.]+\]")

DEMO = Path(__file__).parents[1] / "demo"
DEMO_NAME = "chorus-demo"


class ServerArgs(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The launch options, from the command line or the keyword arguments of `Engine`.

    Items of `lora_paths` are `path`, `name=path` or a JSON object; see `parse_adapter`. `port` None: no HTTP server.
    """

    model_path: str | None = None
    tokenizer_path: str | None = None
    host: str = "127.0.0.1"
    port: int | None = 30000
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Dtype = "auto"
    attention_backend: Literal["auto", "torch", "triton"] = "auto"
    cpu_kernels: CpuKernels = "auto"
    cpu_threads: int | None = None
    enable_lora: bool | None = None
    lora_paths: list[str] = []
    max_loras_per_batch: int = 8
    max_lora_rank: int | None = None
    lora_target_modules: list[str] | None = None
    lora_backend: Literal["auto", "torch", "triton", "csgmv"] = "auto"
    max_lora_chunk_size: int = 16
    lora_dtype: Dtype = "auto"
    enable_lora_bias: bool = True
    lora_extra_vocab_size: int | None = None
    lora_pool_size: str | None = None
    lora_eviction_policy: Literal["lru", "fifo"] = "lru"
    lora_max_wait: float = 5.0
    schedule_policy: Literal["fcfs", "priority", "fair"] = "fcfs"
    tenant_weights: list[str] = []
    max_loaded_loras: int | None = None
    lora_host_memory: str | None = None
    lora_root: list[str] = []
    lora_resolve_root: str | None = None
    allow_runtime_lora_updating: bool = False
    max_open_requests: int = 4096
    max_queued_tokens: int | None = None
    request_timeout: float | None = None
    max_stream_buffer: str = "4MiB"
    stream_stall_timeout: float = 60.0
    max_request_memory: str | None = None
    read_timeout: float = 30.0
    max_connections: int = 8192
    max_connections_per_address: int | None = None
    api_key: list[str] = []
    api_key_file: str | None = None
    admin_api_key: str | None = None
    allowed_origins: list[str] = []
    allowed_methods: list[str] = []
    allowed_headers: list[str] = []
    allow_credentials: bool = False
    metrics_rights: Literal["auto", "open", "hide-adapters", "operator"] = "auto"
    allowed_hosts: list[str] = []
    max_num_batched_tokens: int | None = None
    max_prefill_tokens: int | None = None
    max_running_requests: int | None = None
    mem_fraction_static: float = 0.9
    context_length: int | None = None
    page_size: int = 16
    max_total_tokens: int | None = None
    disable_radix_cache: bool = False
    cuda_graph_max_bs: int | None = None
    disable_cuda_graph: bool = False
    disable_overlap_schedule: bool = False
    served_model_name: list[str] = []
    chat_template: str | None = None
    seed: int | None = None
    log_level: LogLevel = "info"
    tp_size: int = 1

    def __post_init__(self) -> None:
        _check_ranges(self)
        _check_contradictions(self)
        _check_hosts(self)


def _check_ranges(args: ServerArgs) -> None:
    bounds: list[tuple[str, float | None, float, float]] = [
        ("--port", args.port, 0, 65535),
        ("--cpu-threads", args.cpu_threads, 1, 1024),
        ("--max-loras-per-batch", args.max_loras_per_batch, 1, 1024),
        ("--max-lora-rank", args.max_lora_rank, 1, 512),
        ("--lora-extra-vocab-size", args.lora_extra_vocab_size, 0, 1 << 20),
        ("--max-loaded-loras", args.max_loaded_loras, 1, 1 << 20),
        ("--max-num-batched-tokens", args.max_num_batched_tokens, 1, 1 << 20),
        ("--max-prefill-tokens", args.max_prefill_tokens, 1, 1 << 20),
        ("--lora-max-wait", args.lora_max_wait, 0.05, 86400),
        ("--max-running-requests", args.max_running_requests, 1, 1 << 16),
        ("--cuda-graph-max-bs", args.cuda_graph_max_bs, 1, 1 << 16),
        ("--context-length", args.context_length, 2, 1 << 30),
        ("--page-size", args.page_size, 1, 256),
        ("--max-total-tokens", args.max_total_tokens, 1, 1 << 40),
        ("--max-open-requests", args.max_open_requests, 1, 1 << 20),
        ("--max-queued-tokens", args.max_queued_tokens, 1, 1 << 40),
        ("--request-timeout", args.request_timeout, 0.001, 1e9),
        ("--stream-stall-timeout", args.stream_stall_timeout, 0.1, 1e9),
        ("--read-timeout", args.read_timeout, 0.1, 1e9),
        ("--max-connections", args.max_connections, 1, 1 << 20),
        ("--max-connections-per-address", args.max_connections_per_address, 1, 1 << 20),
        ("--seed", args.seed, 0, (1 << 63) - 1),
        ("--tp-size", args.tp_size, 1, 1 << 10),
    ]
    for flag, value, low, high in bounds:
        if value is not None and not low <= value <= high:
            raise ConfigError(f"{flag} {value}: must be from {low} to {high}")
    if args.max_lora_chunk_size not in (16, 32, 64, 128):
        raise ConfigError(f"--max-lora-chunk-size {args.max_lora_chunk_size}: must be 16, 32, 64 or 128")
    if not 0.0 < args.mem_fraction_static <= 1.0:
        raise ConfigError(f"--mem-fraction-static {args.mem_fraction_static}: must be above 0 and at most 1")
    if args.tp_size > 1:
        raise ConfigError(f"--tp-size {args.tp_size}: tensor parallelism is not available yet; leave it at 1")


def _check_contradictions(args: ServerArgs) -> None:
    if args.enable_lora is False:
        for flag, value in (
            ("--lora-paths", args.lora_paths),
            ("--max-lora-rank", args.max_lora_rank),
            ("--lora-target-modules", args.lora_target_modules),
            ("--lora-pool-size", args.lora_pool_size),
            ("--max-loaded-loras", args.max_loaded_loras),
            ("--lora-host-memory", args.lora_host_memory),
            ("--lora-resolve-root", args.lora_resolve_root),
        ):
            if value:
                raise ConfigError(f"--no-enable-lora contradicts {flag}: drop one of them")
    if args.max_loaded_loras is not None and args.max_loaded_loras < args.max_loras_per_batch:
        raise ConfigError(
            f"--max-loaded-loras {args.max_loaded_loras} is below --max-loras-per-batch {args.max_loras_per_batch}: "
            "a step's adapters must fit the host tier"
        )
    if args.disable_cuda_graph and args.cuda_graph_max_bs is not None:
        raise ConfigError("--disable-cuda-graph contradicts --cuda-graph-max-bs: drop one of them")
    if args.tenant_weights and args.schedule_policy != "fair":
        raise ConfigError("--tenant-weights: weighs nothing without --schedule-policy fair; add it")
    for name in args.served_model_name:
        if not name:
            raise ConfigError("--served-model-name: a name must not be empty")
        if args.served_model_name.count(name) > 1:
            raise ConfigError(f"--served-model-name: {name} is given twice")


def _check_hosts(args: ServerArgs) -> None:
    for host in args.allowed_hosts:
        if not _HOST.fullmatch(host):
            raise ConfigError(
                f"--allowed-hosts {host}: give names or addresses without scheme and port, like llm.example.com, "
                "*.example.com, or * for every host"
            )


def served_names(args: ServerArgs) -> list[str]:
    """Returns the base model's names; responses show the first."""
    return list(args.served_model_name) or [args.model_path or DEMO_NAME]
