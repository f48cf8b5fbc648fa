"""What was asked (Args, one field a flag), what it means (the sections), and the step between them (`resolve`).

Config is declared once, resolved once, frozen; each process reads its own section. Knows nothing of argv (engine.cli)
nor of the hub (engine.hub): paths in the sections are local directories.
"""

from __future__ import annotations

from typing import Literal

import msgspec

LogLevel = Literal["debug", "info", "warning", "error"]


class AdapterSource(msgspec.Struct, frozen=True, kw_only=True):
    """An adapter given at start. `path` is as given, `root` the resolved directory, `base` what it says it was made on."""

    adapter_id: int
    name: str
    path: str
    root: str
    pinned: bool = False
    base: str | None = None


class Links(msgspec.Struct, frozen=True, kw_only=True):
    """Where this process's inbox is bound and where its neighbours' are; `epoch` is its incarnation."""

    epoch: int = 0
    tokenizer: str
    scheduler: str
    runner: str
    door: str
    max_frame_bytes: int = 64 << 20


class TokenizerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The tokenizer/API process. `listen_fd` is the launcher's listening socket, None = no HTTP (embedded)."""

    links: Links
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
    max_open_requests: int = 4096
    max_body_bytes: int = 32 << 20
    server_info: dict[str, str | int | float | bool | None] = {}


class SchedulerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The scheduler process. `window` is how many steps may be in flight."""

    links: Links
    max_loras: int = 0
    window: int = 1
    adapters: list[AdapterSource] = []
    log_level: LogLevel = "info"


class RunnerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """One rank of the model runner. `adapters` are loaded first: they size the pools when no flag does.

    `max_lora_rank` and `lora_targets` None mean: inferred from `adapters` (without any: 64 and all sites).
    `max_running_requests` and `context_length` None mean: from memory, and the model's.
    """

    links: Links
    model_path: str
    device: Literal["cpu", "cuda"] = "cpu"
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    rank: int = 0
    tp_size: int = 1
    attention_backend: str = "auto"
    enable_lora: bool = False
    lora_backend: str = "auto"
    lora_dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    max_loras: int = 8
    max_lora_rank: int | None = None
    lora_targets: list[str] | None = None
    adapters: list[AdapterSource] = []
    max_batched_tokens: int = 512
    max_running_requests: int | None = None
    mem_fraction: float = 0.9
    context_length: int | None = None
    page_size: int = 16
    seed: int = 0
    log_level: LogLevel = "info"
