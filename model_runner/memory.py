"""How much of everything fits: KV pages, rows, rank pages. One place, numbers in, numbers out; nothing is allocated.

    CUDA    total * mem_fraction = weights and what else is in use | margin for activations | rank pages | KV pages
    CPU     rank pages: at most a tenth of the memory              KV: min(4 GiB, a quarter of the memory)

Knows nothing of tensors, and of adapters only what their footprints say.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass

from engine.errors import ConfigError
from model_runner.lora.adapter import pages_for

log = logging.getLogger(__name__)

GIB = 1 << 30
CPU_KV_BYTES = 4 * GIB
DEFAULT_FRACTION = 0.9
LORA_SHARE = 0.1
MAX_ROWS = 256
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


def resolve_length(model: int, asked: int | None) -> int:
    """The longest request in tokens. Raises ConfigError where `--context-length` is above the model's."""
    if asked is not None and asked > model:
        raise ConfigError(f"--context-length {asked}: the model's own limit is {model}; choose at most that")
    return model if asked is None else asked


def plan_kv(
    budget: int, page_bytes: int, page_size: int, *, length: int, asked_length: int | None, asked_rows: int | None
) -> KvPlan:
    """Pages and rows for `budget` bytes: never more than all rows could fill.

    A length that nobody asked for gives way to what fits. Raises ConfigError when a request of the asked length, or
    any request at all, does not fit.
    """
    fits = budget // page_bytes
    if fits < 1:
        raise ConfigError(
            f"--mem-fraction-static: {budget >> 20} MiB remain for the KV cache, not enough for one page"
            f" ({page_bytes >> 10} KiB); raise it, or use a smaller model or pool of adapters"
        )
    tokens = fits * page_size
    if tokens < length:
        if asked_length is not None:
            raise ConfigError(
                f"--context-length {asked_length}: the KV cache has room for {tokens} tokens;"
                f" lower it to that, or raise --mem-fraction-static"
            )
        log.warning("the model's context of %d tokens does not fit: --context-length is %d", length, tokens)
        length = tokens
    rows = asked_rows or max(1, min(MAX_ROWS, tokens // min(length, TYPICAL_LENGTH)))
    needed = rows * -(-length // page_size)
    return KvPlan(min(fits, needed), rows, length)


def plan_rank_pages(
    page_bytes: dict[str, int], groups: Iterable[str], *, max_rank: int, default: int, room: Room, asked: PoolSize
) -> dict[str, int]:
    """Rank pages of each group: whole adapters of `max_rank`, as many as asked for, or `default` and fewer.

    Without a wish the pool stays in a tenth of the memory, but holds one adapter at least. Raises ConfigError when
    even one is too much, or what was asked for.
    """
    each = pages_for(max_rank)
    chosen = sorted(set(groups))
    one = sum(each * page_bytes[group] for group in chosen)
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
    return dict.fromkeys(chosen, count * each)


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


def lane_pages(max_rank: int) -> int:
    """The longest lane, in pages of one group: twice the largest adapter, so that two of them can be mixed."""
    return 2 * pages_for(max_rank)
