"""The config of each process: resolved once by the launcher, frozen, and read by the process from its stdin.

Paths are local directories. The values are derived from the flags in engine.config.resolve; hub ids are resolved in
engine.hub.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from engine.config.api_keys import ApiKey
from engine.config.cors import Cors
from engine.config.server_args import CpuKernels, Dtype, LogLevel


class AdapterSource(msgspec.Struct, frozen=True, kw_only=True):
    """Where an adapter comes from.

    `path` is the path that the user gave, `root` the resolved directory, `base` the base model's name given with it.
    With `roots` the real path of every file must lie under one of them, each time the file is read. `revision` is the
    hash of the files that were loaded, empty before that, and `text_revision` that of the tokenizer, chat template and
    generation config that they bring, empty without any.
    """

    adapter_id: int
    name: str
    path: str
    root: str
    pinned: bool = False
    base: str | None = None
    roots: list[str] = []
    revision: str = ""
    text_revision: str = ""


class Endpoints(msgspec.Struct, frozen=True, kw_only=True):
    """ZeroMQ addresses of the inboxes and of the server for clients. `epoch` is this process's incarnation, from 0."""

    epoch: int = 0
    tokenizer: str
    scheduler: str
    runner: str
    zmq_server: str
    max_frame_bytes: int = 64 << 20


class TokenizerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Config of the tokenizer process. `listen_fd` is the launcher's listening socket; None: no HTTP server (embedded).

    Tokenizer and chat template are read from `tokenizer_path`, generation_config.json from `model_path`.
    `runtime_loads`: adapters may be loaded over HTTP without `admin_key`. With `lora_roots`, which then include the
    hub's cache, the real path of every adapter file must lie under one of them. `priorities`: requests may have a
    priority other than 0. `journal` are the descriptors of the journal of adapters, `work_notes` that of the notes of
    work in progress. `after_fault`: the former incarnation ended by its own fault. `max_stream_buffer`: bytes that may
    be buffered for a client, which must read some of them within `stream_stall_timeout` seconds. `max_request_memory`:
    bytes of bodies and answers together. `read_timeout`: seconds in which a request must arrive.
    `max_connections_per_address` None: a quarter of `max_connections`, and all for loopback addresses.
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
    cors: Cors = Cors()
    metrics_rights: Literal["open", "hide-adapters", "operator"] = "open"
    allowed_hosts: list[str] = []
    lora_roots: list[str] = []
    lora_resolve_root: str | None = None
    journal: list[int] = []
    work_notes: int | None = None
    after_fault: bool = False
    max_open_requests: int = 4096
    max_queued_tokens: int | None = None
    request_timeout: float | None = None
    max_body_bytes: int = 32 << 20
    max_request_memory: int = 2 << 30
    read_timeout: float = 30.0
    max_connections: int = 8192
    max_connections_per_address: int | None = None
    max_stream_buffer: int = 4 << 20
    stream_stall_timeout: float = 60.0
    server_info: dict[str, str | int | float | bool | None] = {}


class SchedulerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Config of the scheduler process. `window` is the number of steps in flight. `prefix_cache`: requests share the KV
    pages of common prefixes.

    `lora_max_wait`: seconds during which later requests may pass a request that waits for a lane or rank pages.
    `max_prefill_tokens`: the most prompt tokens in a step that also decodes; None: a quarter of the runner's
    `max_batched_tokens`. `tenant_weights`: the tenants' shares under the policy fair; a tenant not listed has 1.
    `max_loaded_loras` and `lora_host_bytes` bound the host cache of adapters; None: no limit on the number, and the
    bytes of the runner's Capacity.
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


class LoraPoolSizes(msgspec.Struct, frozen=True):
    """What a runner made its LoRA pool for: the largest rank, modules, pages by group, tokens beyond the base's."""

    max_rank: int
    targets: list[str]
    pages: dict[str, int]
    extra_vocab: int


class RunnerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Config of one rank of the model runner. `adapters` are loaded at start; they size the LoRA pools where no flag
    does.

    `max_lora_rank` and `lora_targets` None: inferred from `adapters` (without adapters: 64 and all sites).
    `lora_extra_vocab`: tokens an adapter may have beyond the base's vocabulary; None: the most that `adapters` have.
    The pool holds `lora_pool_adapters` adapters of the largest rank, or `lora_pool_bytes`; both None: sized from
    memory.
    Decode steps of up to `cuda_graph_max_rows` rows (None: 256) are captured on CUDA, unless `cuda_graphs` is False.
    `cpu_kernels`: C++ kernels for a CPU; auto: used in bfloat16, compiled while serving; on: compiled before Ready.
    `cpu_threads` None: OMP_NUM_THREADS; where that is unset, all cores of up to four, else all but one.
    `device` auto: cuda where there is one. `max_batched_tokens` None: 512 on a CPU, 8192 on CUDA.
    `max_running_requests` and `max_total_tokens` None: sized from memory; `context_length` None: the model's.
    `after_fault`: the former incarnation ended by itself, perhaps because of the steps it ran.
    `lora_pool`: the sizes of the former incarnations' pool, as the files of `adapters` may be gone by then.
    """

    endpoints: Endpoints
    model_path: str
    served_model_names: list[str] = []
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
    lora_pool: LoraPoolSizes | None = None
    log_level: LogLevel = "info"


class ProcessConfigs(msgspec.Struct, frozen=True, kw_only=True):
    """The configs of the three processes of one launch."""

    tokenizer: TokenizerConfig
    scheduler: SchedulerConfig
    runner: RunnerConfig
