"""The command line: flags to Args. SGLang's names, with vLLM's as aliases, so that a command line moves over unchanged.

A flag that the design has but the code has not yet is in `LATER`: it ends the launch with one line, as any other
mistake does. Imports nothing heavy, so --help is quick.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import NoReturn

from engine.args import Args
from engine.errors import ConfigError

LATER = {
    "--lora-max-wait": "requests are served first come first served",
    "--schedule-policy": "requests are served first come first served",
    "--page-size": "it is 16",
    "--block-size": "it is 16",
    "--max-total-tokens": "it follows from --mem-fraction-static",
    "--disable-radix-cache": "prefixes are not reused yet",
    "--no-enable-prefix-caching": "prefixes are not reused yet",
    "--enable-prefix-caching": "prefixes are not reused yet",
    "--tokenizer-path": "the model's own tokenizer is used",
    "--tokenizer": "the model's own tokenizer is used",
    "--revision": "write org/name@revision instead",
    "--attention-backend": "it is torch",
    "--max-lora-chunk-size": "there is no csgmv backend yet",
    "--enable-lora-bias": "adapters with biases are refused",
    "--lora-extra-vocab-size": "adapters with added tokens are refused",
    "--fully-sharded-loras": "tensor parallelism is not available yet",
    "--cuda-graph-max-bs": "the model runs eagerly",
    "--disable-cuda-graph": "the model runs eagerly",
    "--enforce-eager": "the model runs eagerly",
    "--cpu-threads": "all cores up to 4 are used",
}
NEVER = {
    "--trust-remote-code": "no code from a model or adapter directory is ever run",
    "--quantization": "quantized bases are not served yet",
}
_DTYPES = {"half": "float16", "fp16": "float16", "bf16": "bfloat16", "float": "float32", "fp32": "float32"}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


class _Refuse(argparse.Action):
    """A flag that is known, and not served: the line says why."""

    def __call__(self, parser: object, namespace: object, values: object, option_string: str | None = None) -> None:
        flag = str(option_string)
        if flag in NEVER:
            raise ConfigError(f"{flag} is refused: {NEVER[flag]}")
        raise ConfigError(f"{flag} is not available yet: {LATER[flag]}")


def _dtype(text: str) -> str:
    return _DTYPES.get(text, text)


def parse(argv: Sequence[str]) -> Args:
    """Reads a command line (without the program's name). Raises ConfigError with one line for people."""
    fields = vars(_parser().parse_args(argv))
    positional = fields.pop("model")
    if positional is not None and fields.get("model_path") not in (None, positional):
        raise ConfigError(f"the model is given twice: {positional} and --model-path {fields['model_path']}")
    if positional is not None:
        fields["model_path"] = positional
    return Args(**{**_from_environment(), **fields})


def _from_environment() -> dict[str, object]:
    """What may also be said by a variable: a key that a process list must not show, and vLLM's switch."""
    fields: dict[str, object] = {}
    if key := os.environ.get("CHORUS_ADMIN_API_KEY"):
        fields["admin_api_key"] = key
    if os.environ.get("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "").lower() in ("1", "true"):
        fields["allow_runtime_lora_updating"] = True
    return fields


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m engine.launch",
        description="Chorus: serve one base model and many LoRA adapters. Without a model it serves a small demo.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=110),
    )
    _add_server_flags(parser)
    _add_model_flags(parser)
    _add_lora_flags(parser)
    _add_runtime_flags(parser)
    for flag in (*LATER, *NEVER):
        parser.add_argument(flag, action=_Refuse, nargs="*", help=argparse.SUPPRESS)
    return parser


def _add_server_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("server")
    add = group.add_argument
    add("--host", help="address to bind (127.0.0.1)")
    add("--port", type=int, help="port to bind, 0 = any free one (30000)")
    add(
        "--api-key",
        nargs="+",
        metavar="KEY",
        help="bearer keys for all but /health, /ready and /metrics; or CHORUS_API_KEY, which no process list shows",
    )
    add("--api-key-file", metavar="FILE", help="keys with rules, a JSON object a line: key, tenant, adapters, rates")
    add("--max-open-requests", type=int, metavar="N", help="answers in the making; more are a 503 at once (4096)")
    add("--max-queued-tokens", type=int, metavar="N", help="prompt tokens of open requests; more are a 503 (no bound)")
    add("--request-timeout", type=float, metavar="S", help="seconds a request may take; then it is a 504 (no bound)")
    add("--served-model-name", nargs="+", metavar="NAME", help="names of the base model (the model path)")
    add("--chat-template", metavar="FILE", help="a jinja file, or the template itself (the model's)")
    add("--seed", "--random-seed", type=int, help="makes requests without a seed of their own repeatable")
    add("--log-level", choices=["debug", "info", "warning", "error"], help="(info)")


def _add_model_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    add = group.add_argument
    parser.add_argument("model", nargs="?", default=None, help="the same as --model-path")
    add("--model-path", "--model", dest="model_path", metavar="MODEL", help="directory or hub id, org/name[@revision]")
    add("--device", choices=["auto", "cpu", "cuda"], help="(auto: cuda where there is one)")
    add("--dtype", type=_dtype, choices=["auto", "bfloat16", "float16", "float32"], help="(auto: the checkpoint's)")
    add("--context-length", "--max-model-len", type=int, metavar="N", help="longest prompt and answer (the model's)")
    add(
        "--max-num-batched-tokens",
        "--chunked-prefill-size",
        type=int,
        metavar="N",
        help="tokens in one step (512 on a CPU, 8192 on CUDA)",
    )
    add("--max-running-requests", "--max-num-seqs", type=int, metavar="N", help="requests in one step (from memory)")
    add(
        "--mem-fraction-static",
        "--gpu-memory-utilization",
        type=float,
        metavar="F",
        help="share of the device's memory to use (0.9)",
    )
    add("--tp-size", "--tensor-parallel-size", type=int, metavar="N", help="GPUs; only 1 for now (1)")


def _add_lora_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("LoRA")
    add = group.add_argument
    add("--enable-lora", action=argparse.BooleanOptionalAction, help="serve adapters (on when some are given)")
    add(
        "--lora-paths",
        "--lora-modules",
        nargs="+",
        action="extend",
        metavar="ADAPTER",
        help='path, name=path, {"lora_name", "lora_path", "pinned"} or {"name", "path", "base_model_name"}',
    )
    add(
        "--max-loras-per-batch",
        "--max-loras",
        type=int,
        metavar="N",
        help="adapters in one step, the base not counted (8)",
    )
    add("--max-lora-rank", type=int, metavar="R", help="largest rank, 1 to 512 (the given adapters', else 64)")
    add(
        "--lora-target-modules",
        nargs="+",
        metavar="MODULE",
        help="modules adapters may touch, or `all` (the given adapters', else all)",
    )
    add("--lora-backend", choices=["auto", "torch"], help="(auto: torch)")
    add("--lora-dtype", type=_dtype, choices=["auto", "bfloat16", "float16", "float32"], help="(auto: the model's)")
    add(
        "--lora-pool-size",
        metavar="SIZE",
        help="adapters of the largest rank on the device, or bytes: 2GiB (by memory)",
    )
    add("--lora-eviction-policy", choices=["lru", "fifo"], help="which idle adapter gives way first (lru)")
    add("--max-loaded-loras", "--max-cpu-loras", type=int, metavar="N", help="adapters in host memory (no limit)")
    add("--lora-host-memory", metavar="SIZE", help="host memory for adapters, 8GiB (half of what is free)")


def _add_runtime_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("loading adapters at run time").add_argument
    add("--lora-root", nargs="+", action="extend", metavar="DIR", help="adapter files must lie under one of these")
    add("--lora-resolve-root", metavar="DIR", help="its subdirectories can be named in requests without a load")
    add(
        "--allow-runtime-lora-updating",
        action="store_true",
        help="loads over HTTP on any bind (loopback only, or with the admin key)",
    )
    add("--admin-api-key", metavar="KEY", help="bearer key for loads and unloads; or CHORUS_ADMIN_API_KEY")
