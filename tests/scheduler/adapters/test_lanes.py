"""scheduler.adapters.lanes: lanes are shared by key, and freed with the last row."""

from __future__ import annotations

import pytest

from scheduler.adapters.lanes import Lanes
from scheduler.types import BASE, LaneKey


def test_lanes_are_shared_by_key_and_freed_with_the_last_row() -> None:
    lanes = Lanes(2)
    a, b = ((1, 1.0),), ((1, 0.5),)
    assert lanes.acquire(BASE) == (0, False)
    assert lanes.acquire(a) == (1, True)
    assert lanes.acquire(a) == (1, False)
    assert lanes.acquire(b) == (2, True)
    assert lanes.free == 0
    assert not lanes.release(a)
    assert lanes.release(a)
    assert lanes.free == 1
    lanes.audit([(b, 2), (BASE, 0)])


@pytest.mark.parametrize("rows", [[], [(((1, 1.0),), 2)], [(((1, 1.0),), 1)] * 2, [(BASE, 1), (((1, 1.0),), 1)]])
def test_lane_audit_finds_wrong_rows(rows: list[tuple[LaneKey, int]]) -> None:
    lanes = Lanes(2)
    lanes.acquire(((1, 1.0),))
    with pytest.raises(AssertionError):
        lanes.audit(rows)
