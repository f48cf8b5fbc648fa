"""The LoRA flags: adapters, backends, pools, admission and eviction, host memory, and loading at run time."""

from __future__ import annotations

import argparse

from engine.config.flags.values import parse_dtype


def add_lora_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("LoRA")
    add = group.add_argument
    add("--enable-lora", action=argparse.BooleanOptionalAction, help="serve adapters (on when adapters are given)")
    add(
        "--lora-paths",
        "--lora-modules",
        nargs="+",
        action="extend",
        metavar="ADAPTER",
        help='adapters to load at start: path, name=path, {"lora_name", "lora_path", "pinned"} or '
        '{"name", "path", "base_model_name"} (none)',
    )
    add(
        "--max-loras-per-batch",
        "--max-loras",
        type=int,
        metavar="N",
        help="adapters in one step; the base model is not counted (8)",
    )
    add("--max-lora-rank", type=int, metavar="R", help="largest rank, 1 to 512 (the given adapters', else 64)")
    add(
        "--lora-target-modules",
        nargs="+",
        metavar="MODULE",
        help="modules that adapters may touch; `all` means the linears of the layers; embed_tokens, lm_head and the "
        "linears of experts are large, and named beside it (the given adapters', else all)",
    )
    _add_compute_flags(group)
    _add_format_and_pool_flags(group)
    _add_wait_flags(group)
    _add_host_memory_flags(group)


def _add_compute_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--lora-backend",
        choices=["auto", "torch", "triton", "csgmv"],
        help="how adapters are computed; auto: csgmv on CUDA, torch on a CPU (auto)",
    )
    add(
        "--max-lora-chunk-size",
        type=int,
        metavar="N",
        help="csgmv: tokens of one adapter that are computed together; 16, 32, 64 or 128 (16)",
    )
    add(
        "--lora-dtype",
        type=parse_dtype,
        choices=["auto", "bfloat16", "float16", "float32"],
        help="number format of adapters; auto: the model's (auto)",
    )


def _add_format_and_pool_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--enable-lora-bias",
        action=argparse.BooleanOptionalAction,
        help="serve adapters that bring biases; without it they are refused (on)",
    )
    add(
        "--lora-extra-vocab-size",
        type=int,
        metavar="N",
        help="tokens that an adapter may have beyond the base's vocabulary; 0 refuses added tokens "
        "(the most that a given adapter has)",
    )
    add(
        "--lora-pool-size",
        metavar="SIZE",
        help="rank pages on the device: a number of adapters of the largest rank, or bytes like 2GiB; fixed at launch "
        "(what --max-loras-per-batch adapters of the largest rank need, at most a tenth of the device's memory)",
    )
    add(
        "--lora-eviction-policy",
        choices=["lru", "fifo"],
        help="which idle adapter is evicted first: the least recently used, or the first that was filled (lru)",
    )


def _add_wait_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--lora-max-wait",
        type=float,
        metavar="SECONDS",
        help="how long later requests may pass a request whose adapter has no lane or no rank pages; then a lane is "
        "freed for it (5)",
    )


def _add_host_memory_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--max-loaded-loras",
        "--max-cpu-loras",
        type=int,
        metavar="N",
        help="adapters in host memory; at least --max-loras-per-batch (no limit)",
    )
    add(
        "--lora-host-memory",
        metavar="SIZE",
        help="bytes of adapters in host memory, like 8GiB (half of what is free at start)",
    )


def add_runtime_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("loading adapters at run time").add_argument
    add(
        "--lora-root",
        nargs="+",
        action="extend",
        metavar="DIR",
        help="directories that adapter files must lie under, by their real path; the hub cache may be read too "
        "(none: any place)",
    )
    add(
        "--lora-resolve-root",
        metavar="DIR",
        help="a directory whose subdirectories can be named in requests without a load call (none)",
    )
    add(
        "--allow-runtime-lora-updating",
        action="store_true",
        help="adapters may be loaded over HTTP on any bind, by every client that can connect; "
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 does the same (off)",
    )
    add(
        "--admin-api-key",
        metavar="KEY",
        help="loads, unloads and pins need `Authorization: Bearer KEY`, also on loopback; the key opens every other "
        "call too. The variable CHORUS_ADMIN_API_KEY does the same (none)",
    )
