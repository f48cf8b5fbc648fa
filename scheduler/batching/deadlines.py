"""Which lanes to preempt now, and which to drain, so that waiting requests meet their deadlines. Numbers alone.

    now         d1 d2             d3                d4 d5          deadlines by which waiting requests must have lanes
    |-----------|--|--------------|-----------------|--|---->
             e1                            e2                      when lanes are free if no request joins them

e1 meets d1, but only if no request joins that lane from now on, and e2 meets d4 for the time being. For d2, d3 and d5
lanes are preempted, each as late as the work for all deadlines before it allows.

It is as late as possible because waiting for a lane costs no running request anything, and because most lanes are free
sooner than expected: rows end before their limit. The test is that of the demand up to each deadline (Baruah, Rosier
and Howell 1990); the latest start that it leaves is earliest-deadline-as-late-as-possible (Chetto and Chetto 1989).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple


class Deadline(NamedTuple):
    """A waiting request's deadline, in seconds."""

    slack: float  # the time until the request must have a lane
    work: float  # the time after that during which no other request can be given a lane


def count_to_preempt(deadlines: Sequence[Deadline], ends: Sequence[float], most: float) -> int:
    """How many of the first `deadlines` (sorted by slack) need a preempted lane now.

    `ends` (sorted) is when lanes are free by themselves. The answer is limited to `most` seconds of work, or one lane.
    """
    needed, affordable, work = 0, 1, 0.0
    for count, deadline in enumerate(deadlines, 1):
        work += deadline.work
        if work <= most:
            affordable = count
        if deadline.slack <= work:
            needed = max(needed, count - bisect_right(ends, deadline.slack))
    return min(needed, affordable)


def lanes_to_drain(deadlines: Sequence[Deadline], ends: Sequence[float], grace: float) -> list[int]:
    """The indices in `ends` (sorted) of lanes that meet one of `deadlines` (by slack) with less than `grace` to spare.

    Each deadline is given the latest end that meets it, so that all other lanes can be joined for longer.
    """
    left, drain = list(range(len(ends))), []
    for deadline in deadlines:
        index = bisect_right(left, deadline.slack, key=ends.__getitem__) - 1
        if index >= 0:
            end = left.pop(index)
            if deadline.slack - ends[end] < grace:
                drain.append(end)
    return drain
