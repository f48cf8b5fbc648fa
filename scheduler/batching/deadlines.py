"""Computes how many lanes to preempt now, and which to drain, so that waiting requests meet their deadlines.

    now         d1 d2             d3                d4 d5          deadlines by which waiting requests must have lanes
    |-----------|--|--------------|-----------------|--|---->
             e1                            e2                      when lanes become free if no request joins them

The lane that ends at e1 serves d1, but only if no request joins that lane from now on. The lane that ends at e2 serves
d4, and may still be joined. For d2, d3 and d5 lanes are preempted, each as late as the work for all deadlines up to it
allows.

Lanes are preempted as late as possible because waiting costs the running requests nothing, and because most lanes are
free sooner than expected: rows end before their limit. The test compares the demand up to each deadline with the time
until then (Baruah, Rosier and Howell 1990). To start at the latest time that it allows is
earliest-deadline-as-late-as-possible scheduling (Chetto and Chetto 1989).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple


class Deadline(NamedTuple):
    """A waiting request's deadline, in seconds."""

    slack: float  # the time until the request must have a lane
    work: float  # the time that giving the request a lane takes: until it is over, no other request is given one


def count_to_preempt(deadlines: Sequence[Deadline], ends: Sequence[float], most: float) -> int:
    """Returns how many of the first `deadlines` (sorted by slack) need a preempted lane now.

    `ends`: the sorted times at which lanes become free without preemption. The result is limited to `most` seconds of
    work, but not to less than one lane.
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
    """Returns the indices in `ends` (sorted) of the lanes to drain, for `deadlines` (sorted by slack).

    Each deadline is assigned the latest end that meets it, so that requests can join the other lanes for longer. A lane
    is drained if it meets its deadline with less than `grace` seconds to spare.
    """
    left, drain = list(range(len(ends))), []
    for deadline in deadlines:
        index = bisect_right(left, deadline.slack, key=ends.__getitem__) - 1
        if index >= 0:
            end = left.pop(index)
            if deadline.slack - ends[end] < grace:
                drain.append(end)
    return drain
