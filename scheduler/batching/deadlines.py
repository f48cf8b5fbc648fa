"""Which deadlines are in danger: who must have a lane now, and which lanes nobody may join any more. Numbers alone.

    now         d1 d2             d3                d4 d5          how long who waits can still wait for a lane
    |-----------|--|--------------|-----------------|--|---->
             e1                            e2                      when lanes are free if nobody joins them

    d1 is met by e1, which nobody is to join now that it just does so; d4 by e2, for the time being. For d2, d3 and d5
    lanes are taken, each as late as the work for all before it allows.

As late as possible, since what is free by itself costs nobody anything, and most lanes are free sooner than they look:
rows end before their limit. The test is that of the demand up to each deadline (Baruah, Rosier and Howell 1990), the
latest start that it leaves is earliest-deadline-as-late-as-possible (Chetto and Chetto 1989).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple


class Wait(NamedTuple):
    """One who waits: seconds until it must have a lane, and how long nobody else can be given one then."""

    slack: float
    work: float


def to_take(waits: Sequence[Wait], ends: Sequence[float], most: float) -> int:
    """How many of the first in `waits` (by slack) must have lanes now, if those of `ends` (sorted) are all there is.

    As many as `most` seconds of work are for; one at least.
    """
    take, now, work = 0, 1, 0.0
    for count, wait in enumerate(waits, 1):
        work += wait.work
        if work <= most:
            now = count
        if wait.slack <= work:
            take = max(take, count - bisect_right(ends, wait.slack))
    return min(take, now)


def to_drain(waits: Sequence[Wait], ends: Sequence[float], grace: float) -> list[int]:
    """Which of `ends` (sorted), by index, just meet the deadline of somebody in `waits` (by slack).

    Everyone gets the latest that is left, so that all others may be joined for longer.
    """
    left, drain = list(range(len(ends))), []
    for wait in waits:
        index = bisect_right(left, wait.slack, key=ends.__getitem__) - 1
        if index >= 0:
            end = left.pop(index)
            if wait.slack - ends[end] < grace:
                drain.append(end)
    return drain
