"""Plans how many rank pages and full-weight slots fit into memory. Pure arithmetic: nothing is allocated.

Adapters are represented by their footprints only.
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

LORA_SHARE = 0.1
"""The largest share of the device's memory that a pool of the default size takes."""


@dataclass(frozen=True)
class Room:
    """Memory of the device in bytes: the total, and what pools may still take."""

    total: int
    free: int


@dataclass(frozen=True)
class PoolSize:
    """The value of `--lora-pool-size`: a number of adapters of the largest rank, or bytes, or neither."""

    adapters: int | None = None
    bytes: int | None = None


def pool_room(device: str, total: int, free: int, fraction: float) -> Room:
    """Returns the memory that rank pages may take; `free` is measured after the weights are loaded."""
    if device == "cuda":
        return Room(total, max(0, int(total * fraction) - (total - free)))
    return Room(total, int(free * fraction))


def plan_rank_pages(
    page_bytes: dict[str, int], groups: Iterable[str], *, max_rank: int, default: int, room: Room, asked: PoolSize
) -> dict[str, int]:
    """Returns the number of rank pages of each group, for the number of adapters of rank `max_rank` that `asked` gives.

    Without a size in `asked`, the pool holds up to `default` adapters and takes at most a tenth of the memory, but
    holds at least one adapter. Where `page_bytes` contains them, one vector slot for each group and one norm slot are
    added for each adapter. Raises ConfigError if one adapter, or the size in `asked`, does not fit.
    """
    each = _pages_of_one(page_bytes, sorted(set(groups)), max_rank)
    one = sum(count * page_bytes[group] for group, count in each.items())
    if one > room.free:
        raise ConfigError(
            f"--max-lora-rank {max_rank}: one adapter of it needs {one >> 20} MiB and {room.free >> 20} MiB are free;"
            " lower it, or name fewer --lora-target-modules"
        )
    if not one:
        return {}
    count = _count_adapters(one, max_rank, default, room, asked)
    return {group: count * needed for group, needed in each.items()}


def _pages_of_one(page_bytes: dict[str, int], groups: list[str], max_rank: int) -> dict[str, int]:
    """Returns the pages and slots that one adapter of `max_rank` needs, by group."""
    each = dict.fromkeys(groups, pages_for(max_rank))
    each |= {vectors: 1 for vectors in map(vectors_of, groups) if vectors in page_bytes}
    return each | ({full_weights_of(NORMS): 1} if groups and full_weights_of(NORMS) in page_bytes else {})


def _count_adapters(one: int, max_rank: int, default: int, room: Room, asked: PoolSize) -> int:
    """Returns how many adapters the pool will hold; each takes `one` bytes."""
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
    return count


def plan_full_weights(
    sizes: dict[str, int], footprints: Iterable[Footprint], most: int, room: Room
) -> tuple[dict[str, int], Room]:
    """Returns the number of full-weight slots by group, and the remaining room.

    Each start-up adapter with a full embedding or head gets a slot, up to `most` slots in a group. The slots are large,
    so none is reserved for adapters that are loaded later. Raises ConfigError if the slots do not fit.
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
    """Returns how many adapters of `one` bytes fit into `asked` bytes; None if `asked` is None."""
    if asked is None:
        return None
    if asked < one:
        raise ConfigError(
            f"--lora-pool-size: {asked} bytes are less than one adapter of rank {max_rank} needs ({one});"
            " raise it, or lower --max-lora-rank"
        )
    return asked // one
