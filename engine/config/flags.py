"""Parses the command line into ServerArgs. Flags have SGLang's names and vLLM's as aliases, so that a command line
moves over unchanged.

A flag of SGLang or vLLM that is not available ends the launch with one line, like any other mistake. Imports nothing
heavy, so --help is quick.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import NoReturn

from engine.config.server_args import ServerArgs
from engine.errors import ConfigError

NOT_YET_AVAILABLE = {
    "--revision": "write org/name@revision instead",
    "--fully-sharded-loras": "tensor parallelism is not available yet",
}
REFUSED = {
    "--trust-remote-code": "no code from a model or adapter directory is ever run",
    "--quantization": "quantized bases are not served yet",
}
_DTYPE_ALIASES = {"half": "float16", "fp16": "float16", "bf16": "bfloat16", "float": "float32", "fp32": "float32"}


_UNAVAILABLE_ATTENTION = {
    "flashinfer": "its kernels are not served",
    "varlen": "torch's varlen_attn reads pages only with flash-attention 3 or 4 installed beside it",
    "fa3": "flash-attention is not served",
    "flash_attn": "flash-attention is not served",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


class _Refuse(argparse.Action):
    """A known flag that is not available; the error says why."""

    def __call__(self, parser: object, namespace: object, values: object, option_string: str | None = None) -> None:
        flag = str(option_string)
        if flag in REFUSED:
            raise ConfigError(f"{flag} is refused: {REFUSED[flag]}")
        raise ConfigError(f"{flag} is not available yet: {NOT_YET_AVAILABLE[flag]}")


_UNAVAILABLE_POLICIES = {
    "lpm": "prefixes are shared whatever the order",
    "dfs-weight": "prefixes are shared whatever the order",
    "lof": "long answers do not go first",
    "random": "the order is never left to chance",
}


def _parse_policy(text: str) -> str:
    if text in _UNAVAILABLE_POLICIES:
        raise argparse.ArgumentTypeError(f"{text}: {_UNAVAILABLE_POLICIES[text]}; fcfs, priority and fair are there")
    return text


def _parse_attention(text: str) -> str:
    name = text.lower()
    if name in _UNAVAILABLE_ATTENTION:
        raise argparse.ArgumentTypeError(f"{text}: {_UNAVAILABLE_ATTENTION[name]}; auto, torch and triton are there")
    return name


def _parse_dtype(text: str) -> str:
    return _DTYPE_ALIASES.get(text, text)


def parse(argv: Sequence[str]) -> ServerArgs:
    """Parses a command line (without the program's name). Raises ConfigError with a one-line message."""
    fields = vars(make_parser().parse_args(argv))
    positional = fields.pop("model")
    if positional is not None and fields.get("model_path") not in (None, positional):
        raise ConfigError(f"the model is given twice: {positional} and --model-path {fields['model_path']}")
    if positional is not None:
        fields["model_path"] = positional
    return ServerArgs(**{**_from_environment(), **fields})


def _from_environment() -> dict[str, object]:
    """Fields set by environment variables: the admin key, which a process list must not show, and vLLM's switch."""
    fields: dict[str, object] = {}
    if key := os.environ.get("CHORUS_ADMIN_API_KEY"):
        fields["admin_api_key"] = key
    if os.environ.get("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "").lower() in ("1", "true"):
        fields["allow_runtime_lora_updating"] = True
    return fields


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command line. Each help text ends with the flag's default in parentheses."""
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
    for flag in (*NOT_YET_AVAILABLE, *REFUSED):
        parser.add_argument(flag, action=_Refuse, nargs="*", help=argparse.SUPPRESS)
    return parser


def _add_server_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("server")
    add = group.add_argument
    add("--host", help="address to bind (127.0.0.1)")
    add("--port", type=int, help="port to bind; 0 takes any free one (30000)")
    add(
        "--api-key",
        nargs="+",
        metavar="KEY",
        help="keys: every call but /health, /ready and /metrics then needs `Authorization: Bearer KEY`. The variables "
        "CHORUS_API_KEY and VLLM_API_KEY do the same and are not visible in a process list (none)",
    )
    add(
        "--api-key-file",
        metavar="FILE",
        help="keys with rules, a JSON object a line: key, tenant, adapters, base, requests_per_minute, "
        "tokens_per_minute (none)",
    )
    add(
        "--max-open-requests",
        type=int,
        metavar="N",
        help="answers in progress at one time; more are refused at once with 503, Retry-After and what the open "
        "requests wait for (4096)",
    )
    add(
        "--max-queued-tokens",
        type=int,
        metavar="N",
        help="prompt tokens of all open requests together; more are refused in the same way (no bound)",
    )
    add(
        "--request-timeout",
        type=float,
        metavar="S",
        help="seconds that a request may take from its arrival; then it ends with a 504 that says how far it came, or "
        "what it waited for (no bound)",
    )
    add(
        "--max-stream-buffer",
        metavar="SIZE",
        help="bytes of an answer that may wait for a client that does not read it; above that its request is aborted "
        "and its connection closed (4MiB)",
    )
    add(
        "--stream-stall-timeout",
        type=float,
        metavar="S",
        help="seconds that a client may take nothing of an answer that waits for it; then the same (60)",
    )
    add(
        "--served-model-name", nargs="+", metavar="NAME", help="one or several names of the base model (the model path)"
    )
    add(
        "--chat-template",
        metavar="FILE",
        help="a jinja file, or the template itself; it also replaces the templates of adapters (the model's)",
    )
    add("--seed", "--random-seed", type=int, help="makes requests without a seed of their own repeatable (none)")
    add("--log-level", choices=["debug", "info", "warning", "error"], help="what is logged to stderr (info)")


def _add_model_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    add = group.add_argument
    parser.add_argument("model", nargs="?", default=None, help="the same as --model-path")
    add(
        "--model-path",
        "--model",
        dest="model_path",
        metavar="MODEL",
        help="a directory, or a hub id: org/name or org/name@revision (the demo)",
    )
    add(
        "--tokenizer-path",
        "--tokenizer",
        metavar="PATH",
        help="a directory or hub id whose tokenizer.json, tokenizer_config.json and chat template are used in place of "
        "the model's (the model's)",
    )
    add("--device", choices=["auto", "cpu", "cuda"], help="where the model runs; auto: cuda where there is one (auto)")
    add(
        "--cpu-threads",
        type=int,
        metavar="N",
        help="threads that compute on a CPU; OMP_NUM_THREADS does the same (all cores up to 4, else all but 1)",
    )
    add(
        "--dtype",
        type=_parse_dtype,
        choices=["auto", "bfloat16", "float16", "float32"],
        help="number format of weights and KV cache; auto: the checkpoint's, but float32 on a processor without fast "
        "bfloat16 (auto)",
    )
    add(
        "--attention-backend",
        type=_parse_attention,
        choices=["auto", "torch", "triton"],
        help="how attention is computed; auto: triton on CUDA, torch on a CPU (auto)",
    )
    add(
        "--cpu-kernels",
        choices=["auto", "on", "off"],
        help="C++ kernels for this CPU. auto: compiled beside the serving if the model is in bfloat16 and there is a "
        "C++ compiler; on: compiled before the server is ready, in float32 too; off: never. They are kept for the "
        "next launch in ~/.cache/chorus/compiled, which no other user may be able to write to (auto)",
    )
    add(
        "--enable-torch-compile",
        dest="cpu_kernels",
        action="store_const",
        const="on",
        help="the same as --cpu-kernels=on (off)",
    )
    add(
        "--context-length",
        "--max-model-len",
        type=int,
        metavar="N",
        help="longest prompt and answer together, in tokens (the model's)",
    )
    add(
        "--max-num-batched-tokens",
        "--chunked-prefill-size",
        type=int,
        metavar="N",
        help="tokens in one step (512 on a CPU, 8192 on CUDA)",
    )
    add(
        "--max-prefill-tokens",
        type=int,
        metavar="N",
        help="prompt tokens in a step that also decodes; it bounds the longest gap between two tokens "
        "(a quarter of --max-num-batched-tokens, at least 64)",
    )
    add("--max-running-requests", "--max-num-seqs", type=int, metavar="N", help="requests in one step (from memory)")
    add(
        "--mem-fraction-static",
        "--gpu-memory-utilization",
        type=float,
        metavar="F",
        help="share of the device's memory to use (0.9)",
    )
    add("--max-total-tokens", type=int, metavar="N", help="tokens in the KV cache, at most (from memory)")
    add(
        "--page-size",
        "--block-size",
        type=int,
        metavar="N",
        help="tokens in a page of the KV cache, 1 to 256; prefixes are shared by whole pages (16)",
    )
    prefixes = group.add_mutually_exclusive_group()
    prefixes.add_argument(
        "--disable-radix-cache",
        "--no-enable-prefix-caching",
        action="store_true",
        help="compute every prompt from its first token, and share nothing between requests (off)",
    )
    prefixes.add_argument(
        "--enable-prefix-caching",
        dest="disable_radix_cache",
        action="store_false",
        help="share the KV pages of common prefixes (on)",
    )
    add(
        "--cuda-graph-max-bs",
        type=int,
        metavar="N",
        help="decode steps of up to N rows are captured as CUDA graphs; does nothing on a CPU (256, or all rows)",
    )
    add(
        "--disable-cuda-graph",
        "--enforce-eager",
        action="store_true",
        help="launch every kernel by itself; does nothing on a CPU (off)",
    )
    add(
        "--disable-overlap-schedule",
        "--no-async-scheduling",
        action="store_true",
        help="one step in flight instead of two: the next step is planned when the tokens of the last one are known "
        "(off)",
    )
    add("--tp-size", "--tensor-parallel-size", type=int, metavar="N", help="GPUs; only 1 for now (1)")


def _add_lora_flags(parser: argparse.ArgumentParser) -> None:
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
        help="modules that adapters may touch; `all` means the linears of the layers, and embed_tokens and lm_head "
        "(which are large) are named beside it (the given adapters', else all)",
    )
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
        type=_parse_dtype,
        choices=["auto", "bfloat16", "float16", "float32"],
        help="number format of adapters; auto: the model's (auto)",
    )
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
    add(
        "--lora-max-wait",
        type=float,
        metavar="SECONDS",
        help="how long later requests may pass a request whose adapter has no lane or no rank pages; then a lane is "
        "freed for it (5)",
    )
    add(
        "--schedule-policy",
        "--scheduling-policy",
        type=_parse_policy,
        choices=["fcfs", "priority", "fair"],
        help="which request is admitted first. fcfs: by arrival; priority: by the field `priority` of the requests, "
        "lower first; fair: the tenant (or, without one, the adapter) that has used least so far (fcfs)",
    )
    add(
        "--tenant-weights",
        nargs="+",
        action="extend",
        metavar="TENANT=W",
        help="shares of tenants under fair, like alice=2 bob=0.5 (1 for every tenant)",
    )
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


def _add_runtime_flags(parser: argparse.ArgumentParser) -> None:
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
        help="loads and unloads need `Authorization: Bearer KEY`, also on loopback; the variable "
        "CHORUS_ADMIN_API_KEY does the same (none)",
    )
