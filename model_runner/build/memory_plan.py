"""How much of the KV cache, of rows and of CUDA graphs fits: numbers in, numbers out, nothing is allocated.

    CUDA    total * mem_fraction = weights and other memory in use | activations, graphs | rank pages | KV pages
    CPU     rank pages: at most a tenth of the memory                KV: min(4 GiB, a quarter of the memory)

Rank pages are planned in lora_plan.py. Knows nothing of tensors.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from engine.errors import ConfigError

log = logging.getLogger(__name__)

GIB = 1 << 30
CPU_KV_BYTES = 4 * GIB
DEFAULT_FRACTION = 0.9
MAX_ROWS = 256
GRAPH_ROWS = 256
GRAPH_BYTES = 8 << 20  # of one graph of some thousand kernels, with what the driver keeps beside it
TYPICAL_LENGTH = 512  # tokens a request is expected to hold when the rows are counted from memory


@dataclass(frozen=True)
class KvPlan:
    """What the KV cache holds: grantable pages, rows, and the longest request in tokens."""

    pages: int
    rows: int
    max_length: int


def kv_budget(device: str, total: int, free: int, fraction: float, reserved: int) -> int:
    """Bytes for the KV cache. `free` is measured with the weights loaded; `reserved` is what is allocated later."""
    if device == "cuda":
        return max(0, int(total * fraction) - (total - free) - reserved)
    return int(min(CPU_KV_BYTES, total // 4) * fraction / DEFAULT_FRACTION)


def activation_margin(tokens: int, rows: int, hidden: int, intermediate: int, vocab: int, itemsize: int) -> int:
    """Bytes a step may need beside weights and caches: a few activations a token, and four copies of float32 logits."""
    return GIB + tokens * (8 * hidden + 4 * intermediate) * itemsize + rows * vocab * 4 * 4


def graph_sizes(rows: int, asked: int | None) -> list[int]:
    """The numbers of rows that decode steps are padded to, up to `asked` or 256, and to all rows at most.

    The spacing grows, so that little is padding and few graphs are kept: 1 2 4 8, by 8 to 64, by 16 to 128, by 32.
    """
    most = min(rows, asked or GRAPH_ROWS)
    usual = [1, 2, 4, *range(8, 64, 8), *range(64, 128, 16), *range(128, most, 32)]
    return [*(size for size in usual if size < most), most]


def graph_bytes(sizes: list[int], kinds: int, hidden: int, intermediate: int, itemsize: int) -> int:
    """Bytes to keep for graphs: the graphs themselves, and the widest step's activations, in their pool and outside."""
    widest = sizes[-1] * (8 * hidden + 4 * intermediate) * itemsize
    return kinds * len(sizes) * GRAPH_BYTES + 2 * widest


def resolve_length(model: int, asked: int | None) -> int:
    """The longest request in tokens. Raises ConfigError where `--context-length` is above the model's."""
    if asked is not None and asked > model:
        raise ConfigError(f"--context-length {asked}: the model's own limit is {model}; choose at most that")
    return model if asked is None else asked


def plan_kv(
    budget: int,
    page_bytes: int,
    page_size: int,
    *,
    length: int,
    asked_length: int | None,
    asked_rows: int | None,
    asked_tokens: int | None = None,
) -> KvPlan:
    """Pages and rows for `budget` bytes: `asked_tokens` where they fit, else at most as many as all rows can fill.

    Without an asked length, `length` shrinks to what fits. Raises ConfigError when a request of the asked length, or
    any request at all, does not fit.
    """
    pages, cause = _kv_pages(budget, page_bytes, page_size, asked_tokens)
    tokens = pages * page_size
    if tokens < length and asked_length is not None:
        raise ConfigError(
            f"--context-length {asked_length}: the KV cache has room for {tokens} tokens;"
            f" lower it to that, or raise {cause}"
        )
    if tokens < length:
        log.warning("the model's context of %d tokens does not fit: --context-length is %d", length, tokens)
        length = tokens
    rows = asked_rows or max(1, min(MAX_ROWS, tokens // min(length, TYPICAL_LENGTH)))
    needed = rows * -(-length // page_size)
    return KvPlan(pages if asked_tokens is not None else min(pages, needed), rows, length)


def _kv_pages(budget: int, page_bytes: int, page_size: int, asked_tokens: int | None) -> tuple[int, str]:
    """The pages that fit and are asked for, and the flag that bounds them."""
    fits = budget // page_bytes
    if fits < 1:
        raise ConfigError(
            f"--mem-fraction-static: {budget >> 20} MiB remain for the KV cache, not enough for one page"
            f" ({page_bytes >> 10} KiB); raise it, or use a smaller model or pool of adapters"
        )
    if asked_tokens is None:
        return fits, "--mem-fraction-static"
    if asked_tokens > fits * page_size:
        log.warning("--max-total-tokens %d: memory has room for %d", asked_tokens, fits * page_size)
        return fits, "--mem-fraction-static"
    if asked_tokens < page_size:
        raise ConfigError(f"--max-total-tokens {asked_tokens}: less than a page of {page_size}; raise it")
    return asked_tokens // page_size, "--max-total-tokens"


def describe_bytes(held: dict[str, int]) -> str:
    """Bytes by holder, in words for a log line."""
    return ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in held.items())
