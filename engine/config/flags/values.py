"""Parses flag values that have aliases, and refuses values of SGLang and vLLM that are not available."""

from __future__ import annotations

import argparse

_DTYPE_ALIASES = {"half": "float16", "fp16": "float16", "bf16": "bfloat16", "float": "float32", "fp32": "float32"}
_UNAVAILABLE_ATTENTION = {
    "flashinfer": "its kernels are not served",
    "varlen": "torch's varlen_attn reads pages only with flash-attention 3 or 4 installed beside it",
    "fa3": "flash-attention is not served",
    "flash_attn": "flash-attention is not served",
}
_UNAVAILABLE_POLICIES = {
    "lpm": "prefixes are shared whatever the order",
    "dfs-weight": "prefixes are shared whatever the order",
    "lof": "long answers do not go first",
    "random": "the order is never left to chance",
}


def parse_policy(text: str) -> str:
    if text in _UNAVAILABLE_POLICIES:
        raise argparse.ArgumentTypeError(f"{text}: {_UNAVAILABLE_POLICIES[text]}; fcfs, priority and fair are there")
    return text


def parse_attention(text: str) -> str:
    name = text.lower()
    if name in _UNAVAILABLE_ATTENTION:
        raise argparse.ArgumentTypeError(f"{text}: {_UNAVAILABLE_ATTENTION[name]}; auto, torch and triton are there")
    return name


def parse_dtype(text: str) -> str:
    return _DTYPE_ALIASES.get(text, text)
