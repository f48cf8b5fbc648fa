"""The lanes of the running set: which key holds which lane number. Knows nothing of a lane's pages.

A key holds a lane from the admission of its first row to the end of its last. The number can be given to another key at
once: the runner changes lanes in step order, after the steps in flight. The base model takes no lane (number 0).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from scheduler.types import BASE, LaneKey


@dataclass(slots=True)
class _Lane:
    """A lane that a key holds."""

    number: int
    since: float  # when it was acquired, in seconds
    rows: int = 0  # how many rows run in it


class Lanes:
    """Lane numbers 1 to `count`, by key."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = list(range(count, 0, -1))
        self._lanes: dict[LaneKey, _Lane] = {}

    def __contains__(self, key: LaneKey) -> bool:
        return key in self._lanes

    @property
    def free(self) -> int:
        """How many lanes are free."""
        return len(self._free)

    def active(self) -> Iterable[LaneKey]:
        """The keys that hold a lane."""
        return self._lanes.keys()

    def rows(self, key: LaneKey) -> int:
        """How many rows run in a key's lane."""
        lane = self._lanes.get(key)
        return lane.rows if lane else 0

    def since(self, key: LaneKey) -> float:
        """When a key acquired the lane that it holds."""
        return self._lanes[key].since

    def acquire(self, key: LaneKey, now: float = 0.0) -> tuple[int, bool]:
        """(number, whether it is new) of the lane for one more row of the key. A new one must be free."""
        if key == BASE:
            return 0, False
        lane = self._lanes.get(key)
        new = lane is None
        if lane is None:
            lane = self._lanes[key] = _Lane(self._free.pop(), now)
        lane.rows += 1
        return lane.number, new

    def release(self, key: LaneKey) -> bool:
        """One row of the key has ended. Returns whether it was the last, so that the lane is free."""
        if key == BASE:
            return False
        lane = self._lanes[key]
        lane.rows -= 1
        if lane.rows:
            return False
        del self._lanes[key]
        self._free.append(lane.number)
        return True

    def audit(self, rows: Iterable[tuple[LaneKey, int]]) -> None:
        """Asserts that the lanes are those of the running rows, given as (key, lane number)."""
        numbers = [lane.number for lane in self._lanes.values()]
        assert sorted(numbers + self._free) == list(range(1, self.count + 1)), f"lanes {numbers}, free {self._free}"
        counts = Counter(rows)
        for (key, number), count in counts.items():
            if key == BASE:
                assert number == 0, f"a base row runs in lane {number}"
                continue
            lane = self._lanes[key]
            assert (lane.number, lane.rows) == (number, count), f"lane {number} of {key} counts {lane.rows} rows"
        assert {key for key, _ in counts} - {BASE} == set(self._lanes), "a lane has no row, or a row has no lane"
