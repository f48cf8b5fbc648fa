"""The lanes of the running requests: which lane key holds which lane number. Knows no rank pages.

A key holds a lane from the admission of its first row to the end of its last row. The number can then be given to
another key at once: the runner changes lanes in step order, after the steps in flight. The base model takes no lane
(its rows have lane number 0).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from scheduler.types import BASE, LaneKey


@dataclass(slots=True)
class _Lane:
    """The lane that a lane key holds."""

    number: int
    since: float  # when it was acquired, in seconds
    rows: int = 0  # how many rows run in it


class Lanes:
    """The lane numbers 1 to `count`: which are free, and which lane key holds each of the others."""

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
        """Returns the keys that hold a lane."""
        return self._lanes.keys()

    def rows(self, key: LaneKey) -> int:
        """Returns how many rows run in the key's lane; 0 if it holds none."""
        lane = self._lanes.get(key)
        return lane.rows if lane else 0

    def since(self, key: LaneKey) -> float:
        """Returns the time at which the key acquired its lane, in seconds. The key must hold one."""
        return self._lanes[key].since

    def acquire(self, key: LaneKey, now: float = 0.0) -> tuple[int, bool]:
        """Adds one row to the key's lane, which is acquired if the key holds none: a lane must be free then.

        Returns (lane number, whether the lane was acquired by this call).
        """
        if key == BASE:
            return 0, False
        lane = self._lanes.get(key)
        new = lane is None
        if lane is None:
            lane = self._lanes[key] = _Lane(self._free.pop(), now)
        lane.rows += 1
        return lane.number, new

    def release(self, key: LaneKey) -> bool:
        """Removes one row from the key's lane. Returns whether it was the last row, so that the lane became free."""
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
        """Asserts that the lanes and their row counts match the running rows, given as (key, lane number)."""
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
