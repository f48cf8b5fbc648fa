"""Plans how many KV pages, rows and CUDA graphs fit into memory. Pure arithmetic: nothing is allocated.

    CUDA    total * mem_fraction = weights and other memory in use | activations, graphs | rank pages | KV pages
    CPU     rank pages: at most a tenth of the memory                KV: min(4 GiB, a quarter of the memory)

Rank pages are planned in lora_plan.py.
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
GRAPH_BYTES = 8 << 20  # estimate for one graph of some thousand kernels, with the driver's data
TYPICAL_LENGTH = 512  # expected tokens of a request, for deriving the number of rows from memory


@dataclass(frozen=True)
class KvPlan:
    """The size of the KV cache: grantable pages, rows, and the longest request in tokens."""

    pages: int
    rows: int
    max_length: int


def kv_budget(device: str, total: int, free: int, fraction: float, reserved: int) -> int:
    """Returns the bytes for the KV cache. `free` is measured after loading the weights; `reserved` is needed later."""
    if device == "cuda":
        return max(0, int(total * fraction) - (total - free) - reserved)
    return int(min(CPU_KV_BYTES, total // 4) * fraction / DEFAULT_FRACTION)


def activation_margin(tokens: int, rows: int, hidden: int, intermediate: int, vocab: int, itemsize: int) -> int:
    """Returns the bytes that a step may need beside weights and caches.

    These are some activations for each token, four copies of the float32 logits, and 1 GiB of margin.
    """
    return GIB + tokens * (8 * hidden + 4 * intermediate) * itemsize + rows * vocab * 4 * 4


def graph_sizes(rows: int, asked: int | None) -> list[int]:
    """Returns the numbers of rows that decode steps are padded to, up to `asked` (None: 256) and at most `rows`.

    The spacing grows, so that there is little padding and few graphs are captured: 1, 2, 4, 8, then in steps of 8 up to
    64, of 16 up to 128, and of 32.
    """
    most = min(rows, asked or GRAPH_ROWS)
    usual = [1, 2, 4, *range(8, 64, 8), *range(64, 128, 16), *range(128, most, 32)]
    return [*(size for size in usual if size < most), most]


def graph_bytes(sizes: list[int], kinds: int, hidden: int, intermediate: int, itemsize: int) -> int:
    """Returns the bytes to reserve for graphs: the graphs, and twice the widest step's activations (in and outside of
    the graphs' memory pool).
    """
    widest = sizes[-1] * (8 * hidden + 4 * intermediate) * itemsize
    return kinds * len(sizes) * GRAPH_BYTES + 2 * widest


def resolve_length(model: int, asked: int | None) -> int:
    """Returns the longest request in tokens. Raises ConfigError if `--context-length` is above the model's."""
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
    """Plans pages and rows for `budget` bytes: pages for `asked_tokens`, or as many as fit and all rows can fill.

    Without `asked_length`, `length` is reduced to what fits. Raises ConfigError if a request of `asked_length` tokens,
    or any request at all, does not fit.
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
    """Returns the number of pages that fit and are asked for, and the name of the flag that bounds the number."""
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
    """Formats `held`, the bytes by what they are used for, as text for a log line."""
    return ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in held.items())
