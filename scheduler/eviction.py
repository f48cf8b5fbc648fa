"""Who goes first when a tier is full: idle copies, sorted by a time. Knows nothing of what is idle, nor of tiers."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from typing import Literal

Policy = Literal["lru", "fifo"]


class EvictionOrder:
    """Copy ids by their stamp, the smallest first: the time of the last use (lru), or of coming here (fifo)."""

    def __init__(self) -> None:
        self._sorted: list[tuple[int, int]] = []
        self._stamps: dict[int, int] = {}

    def __contains__(self, copy_id: int) -> bool:
        return copy_id in self._stamps

    def __iter__(self) -> Iterator[int]:
        return (copy_id for _, copy_id in self._sorted)

    def __len__(self) -> int:
        return len(self._sorted)

    def put(self, copy_id: int, stamp: int) -> None:
        """Enters it, or moves it."""
        if self._stamps.get(copy_id) == stamp:
            return
        self.drop(copy_id)
        self._stamps[copy_id] = stamp
        insort(self._sorted, (stamp, copy_id))

    def drop(self, copy_id: int) -> None:
        """Takes it out, if it is there."""
        stamp = self._stamps.pop(copy_id, None)
        if stamp is not None:
            del self._sorted[bisect_left(self._sorted, (stamp, copy_id))]

    def clear(self) -> None:
        """Takes all out."""
        self._sorted.clear()
        self._stamps.clear()
