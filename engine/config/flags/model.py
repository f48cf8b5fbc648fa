"""The flags of the model: path, backends and dtype, sizes of steps and KV cache, CUDA graphs, the order of requests."""

from __future__ import annotations

import argparse

from engine.config.flags.values import parse_attention, parse_dtype, parse_policy


def add_model_flags(parser: argparse.ArgumentParser) -> None:
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
    _add_compute_flags(group)
    _add_size_flags(group)
    _add_prefix_flags(group)
    _add_step_flags(group)
    _add_order_flags(group)


def _add_compute_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--device", choices=["auto", "cpu", "cuda"], help="where the model runs; auto: cuda where there is one (auto)")
    add(
        "--cpu-threads",
        type=int,
        metavar="N",
        help="threads that compute on a CPU; OMP_NUM_THREADS does the same (all cores up to 4, else all but 1)",
    )
    add(
        "--dtype",
        type=parse_dtype,
        choices=["auto", "bfloat16", "float16", "float32"],
        help="number format of weights and KV cache; auto: the checkpoint's, but float32 on a processor without fast "
        "bfloat16 (auto)",
    )
    add(
        "--attention-backend",
        type=parse_attention,
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


def _add_size_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
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


def _add_prefix_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
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


def _add_step_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
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


def _add_order_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--schedule-policy",
        "--scheduling-policy",
        type=parse_policy,
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
