"""Copy ids sorted by a stamp, such as the tick of their last use. Does not depend on the caches or on eviction."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from typing import Generic, Literal, TypeVar

from scheduler.types import Order

Policy = Literal["lru", "fifo"]

Stamp = TypeVar("Stamp", int, Order)


class StampOrder(Generic[Stamp]):
    """Copy ids sorted by their stamp, the smallest first.

    The stamp of a spare copy is the tick of its last use (lru) or of its load or fill (fifo); that of a wanted copy is
    the order of the first request that waits for it.
    """

    def __init__(self) -> None:
        self._sorted: list[tuple[Stamp, int]] = []
        self._stamps: dict[int, Stamp] = {}

    def __contains__(self, copy_id: int) -> bool:
        return copy_id in self._stamps

    def __iter__(self) -> Iterator[int]:
        return (copy_id for _, copy_id in self._sorted)

    def __len__(self) -> int:
        return len(self._sorted)

    def above(self, stamp: Stamp) -> Iterator[int]:
        """Iterates over the copies whose stamp is larger than `stamp`, the largest first."""
        for found, copy_id in reversed(self._sorted):
            if not found > stamp:
                return
            yield copy_id

    def stamp(self, copy_id: int) -> Stamp | None:
        """Returns the stamp of a copy, or None if it is not listed."""
        return self._stamps.get(copy_id)

    def put(self, copy_id: int, stamp: Stamp) -> None:
        """Lists a copy with this stamp, or changes its stamp if it is listed."""
        if self._stamps.get(copy_id) == stamp:
            return
        self.drop(copy_id)
        self._stamps[copy_id] = stamp
        insort(self._sorted, (stamp, copy_id))

    def drop(self, copy_id: int) -> None:
        """Removes a copy, if it is listed."""
        stamp = self._stamps.pop(copy_id, None)
        if stamp is not None:
            del self._sorted[bisect_left(self._sorted, (stamp, copy_id))]

    def clear(self) -> None:
        """Removes all copies."""
        self._sorted.clear()
        self._stamps.clear()
