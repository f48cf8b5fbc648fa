"""What each process reads: its section, resolved once by the launcher and frozen.

Paths in the sections are local directories. Knows nothing of argv (engine.cli) nor of the hub (engine.hub).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import msgspec

from engine.args import Args, Dtype, LogLevel, served_names


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
    `device` auto means: cuda where there is one. `max_batched_tokens` None means: 512 on a CPU, 8192 on CUDA.
    `max_running_requests` and `context_length` None mean: from memory, and the model's.
    """

    links: Links
    model_path: str
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Dtype = "auto"
    rank: int = 0
    tp_size: int = 1
    attention_backend: str = "auto"
    enable_lora: bool = False
    lora_backend: str = "auto"
    lora_dtype: Dtype = "auto"
    max_loras: int = 8
    max_lora_rank: int | None = None
    lora_targets: list[str] | None = None
    adapters: list[AdapterSource] = []
    max_batched_tokens: int | None = None
    max_running_requests: int | None = None
    mem_fraction: float = 0.9
    context_length: int | None = None
    page_size: int = 16
    seed: int = 0
    log_level: LogLevel = "info"


class Sections(msgspec.Struct, frozen=True, kw_only=True):
    """One launch, resolved: what each process will read."""

    tokenizer: TokenizerConfig
    scheduler: SchedulerConfig
    runner: RunnerConfig


def sections(
    args: Args, *, links: Links, model: Path, adapters: list[AdapterSource], listen_fd: int | None
) -> Sections:
    """Every process's section, from the flags and what was resolved: directories, addresses, the listening socket."""
    enable_lora = bool(adapters) if args.enable_lora is None else args.enable_lora
    enable_lora = enable_lora or args.max_lora_rank is not None or args.lora_target_modules is not None
    max_loras = args.max_loras_per_batch if enable_lora else 0
    shared: dict[str, Any] = {"links": links, "log_level": args.log_level, "adapters": adapters, "max_loras": max_loras}
    tokenizer = TokenizerConfig(
        model_path=str(model),
        tokenizer_path=str(model),
        served_model_names=served_names(args),
        chat_template=args.chat_template,
        enable_lora=enable_lora,
        listen_fd=listen_fd,
        seed=args.seed,
        server_info=_server_info(args),
        **shared,
    )
    runner = RunnerConfig(
        model_path=str(model),
        device=args.device,
        dtype=args.dtype,
        tp_size=args.tp_size,
        enable_lora=enable_lora,
        lora_backend=args.lora_backend,
        lora_dtype=args.lora_dtype,
        max_lora_rank=args.max_lora_rank,
        lora_targets=args.lora_target_modules,
        max_batched_tokens=args.max_num_batched_tokens,
        max_running_requests=args.max_running_requests,
        mem_fraction=args.mem_fraction_static,
        context_length=args.context_length,
        seed=args.seed or 0,
        **shared,
    )
    return Sections(tokenizer=tokenizer, scheduler=SchedulerConfig(**shared), runner=runner)


def _server_info(args: Args) -> dict[str, str | int | float | bool | None]:
    shown = msgspec.to_builtins(args)
    return {name: value if not isinstance(value, list) else ", ".join(value) for name, value in shown.items()}
