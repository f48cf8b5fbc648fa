"""How much of everything fits: KV pages, rows, rank pages. One place, numbers in, numbers out; nothing is allocated.

    CUDA    total * mem_fraction = weights and what else is in use | activations, graphs | rank pages | KV pages
    CPU     rank pages: at most a tenth of the memory              KV: min(4 GiB, a quarter of the memory)

Knows nothing of tensors, and of adapters only what their footprints say.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass

from engine.errors import ConfigError
from engine.messages import Footprint
from model_runner.lora.normal_form import pages_for
from model_runner.lora.site import EMBED, HEAD, NORMS, full_weights_of, vectors_of

log = logging.getLogger(__name__)

GIB = 1 << 30
CPU_KV_BYTES = 4 * GIB
DEFAULT_FRACTION = 0.9
LORA_SHARE = 0.1
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


@dataclass(frozen=True)
class Room:
    """Bytes of the device: all of them, and those that pools may still take."""

    total: int
    free: int


@dataclass(frozen=True)
class PoolSize:
    """What `--lora-pool-size` says: adapters of the largest rank, or bytes, or neither."""

    adapters: int | None = None
    bytes: int | None = None


def pool_room(device: str, total: int, free: int, fraction: float) -> Room:
    """What rank pages may take; `free` is measured with the weights loaded."""
    if device == "cuda":
        return Room(total, max(0, int(total * fraction) - (total - free)))
    return Room(total, int(free * fraction))


def kv_budget(device: str, total: int, free: int, fraction: float, reserved: int) -> int:
    """Bytes for the KV cache. `free` is measured with the weights loaded; `reserved` is what is still to be made."""
    if device == "cuda":
        return max(0, int(total * fraction) - (total - free) - reserved)
    return int(min(CPU_KV_BYTES, total // 4) * fraction / DEFAULT_FRACTION)


def activation_margin(tokens: int, rows: int, hidden: int, intermediate: int, vocab: int, itemsize: int) -> int:
    """Bytes a step may need beside weights and caches: a few widths a token, and float32 logits a few times over."""
    return GIB + tokens * (8 * hidden + 4 * intermediate) * itemsize + rows * vocab * 4 * 4


def graph_sizes(rows: int, asked: int | None) -> list[int]:
    """The numbers of rows that decode steps are padded to, up to `asked` or 256, and to all rows at most.

    Ever coarser, so that few rows are padding and few graphs are kept: 1 2 4 8, by 8 to 64, by 16 to 128, by 32.
    """
    most = min(rows, asked or GRAPH_ROWS)
    usual = [1, 2, 4, *range(8, 64, 8), *range(64, 128, 16), *range(128, most, 32)]
    return [*(size for size in usual if size < most), most]


def graph_bytes(sizes: list[int], kinds: int, hidden: int, intermediate: int, itemsize: int) -> int:
    """Bytes to keep for graphs: the graphs themselves, and what the widest step needs, in their pool and outside."""
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
    """Pages and rows for `budget` bytes: `asked_tokens` where they fit, else never more than all rows could fill.

    A length that nobody asked for gives way to what fits. Raises ConfigError when a request of the asked length, or
    any request at all, does not fit.
    """
    fits = budget // page_bytes
    if fits < 1:
        raise ConfigError(
            f"--mem-fraction-static: {budget >> 20} MiB remain for the KV cache, not enough for one page"
            f" ({page_bytes >> 10} KiB); raise it, or use a smaller model or pool of adapters"
        )
    cause = "--mem-fraction-static"
    if asked_tokens is not None and asked_tokens <= fits * page_size:
        fits, cause = asked_tokens // page_size, "--max-total-tokens"
        if not fits:
            raise ConfigError(f"--max-total-tokens {asked_tokens}: less than a page of {page_size}; raise it")
    elif asked_tokens is not None:
        log.warning("--max-total-tokens %d: memory has room for %d", asked_tokens, fits * page_size)
    tokens = fits * page_size
    if tokens < length:
        if asked_length is not None:
            raise ConfigError(
                f"--context-length {asked_length}: the KV cache has room for {tokens} tokens;"
                f" lower it to that, or raise {cause}"
            )
        log.warning("the model's context of %d tokens does not fit: --context-length is %d", length, tokens)
        length = tokens
    rows = asked_rows or max(1, min(MAX_ROWS, tokens // min(length, TYPICAL_LENGTH)))
    needed = rows * -(-length // page_size)
    return KvPlan(fits if asked_tokens is not None else min(fits, needed), rows, length)


def plan_rank_pages(
    page_bytes: dict[str, int], groups: Iterable[str], *, max_rank: int, default: int, room: Room, asked: PoolSize
) -> dict[str, int]:
    """Rank pages of each group: whole adapters of `max_rank`, as many as asked for, or `default` and fewer.

    A group's vector slots, one an adapter, come with it where `page_bytes` names them, and so do slots for norms.
    Without a wish the pool stays in a tenth of the memory, but holds one adapter at least. Raises ConfigError when even
    one is too much, or what was asked for.
    """
    chosen = sorted(set(groups))
    each = dict.fromkeys(chosen, pages_for(max_rank))
    each |= {vectors: 1 for vectors in map(vectors_of, chosen) if vectors in page_bytes}
    each |= {full_weights_of(NORMS): 1} if chosen and full_weights_of(NORMS) in page_bytes else {}
    one = sum(count * page_bytes[group] for group, count in each.items())
    if one > room.free:
        raise ConfigError(
            f"--max-lora-rank {max_rank}: one adapter of it needs {one >> 20} MiB and {room.free >> 20} MiB are free;"
            " lower it, or name fewer --lora-target-modules"
        )
    if not one:
        return {}
    count = asked.adapters if asked.adapters is not None else _fitting(asked.bytes, one, max_rank)
    if count is None:
        count = max(1, min(default, int(room.total * LORA_SHARE) // one))
        if count < default:
            log.warning("the LoRA pool holds %d of %d adapters of rank %d at once", count, default, max_rank)
    elif not 0 < count * one <= room.free:
        raise ConfigError(
            f"--lora-pool-size: {count} adapters of rank {max_rank} need {count * one >> 20} MiB and"
            f" {room.free >> 20} MiB are free; lower it, or --max-lora-rank"
        )
    return {group: count * needed for group, needed in each.items()}


def plan_matrices(
    sizes: dict[str, int], footprints: Iterable[Footprint], most: int, room: Room
) -> tuple[dict[str, int], Room]:
    """Matrix slots by group, one for each start-up adapter that brings a matrix and at most `most`; the room left.

    They are large, so nothing is kept for adapters to come. Raises ConfigError where they do not fit.
    """
    counts: dict[str, int] = {}
    for footprint in footprints:
        for group in footprint.pages.keys() & {full_weights_of(EMBED), full_weights_of(HEAD)}:
            counts[group] = min(most, counts.get(group, 0) + 1)
    needed = sum(count * sizes[group] for group, count in counts.items())
    if needed > room.free:
        raise ConfigError(
            f"--lora-paths: the whole embeddings and heads of {max(counts.values())} adapters need {needed >> 20} MiB"
            f" and {room.free >> 20} MiB are free; give fewer of them, or lower --max-loras-per-batch"
        )
    return counts, Room(room.total, room.free - needed)


def _fitting(asked: int | None, one: int, max_rank: int) -> int | None:
    """How many adapters of `one` bytes fit the bytes asked for."""
    if asked is None:
        return None
    if asked < one:
        raise ConfigError(
            f"--lora-pool-size: {asked} bytes are less than one adapter of rank {max_rank} needs ({one});"
            " raise it, or lower --max-lora-rank"
        )
    return asked // one


def shares(held: dict[str, int]) -> str:
    """Bytes by holder, for people."""
    return ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in held.items())
