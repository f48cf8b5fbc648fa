"""Computes which lanes must be preempted so that waiting requests get a lane and rank pages. Changes no table."""

from __future__ import annotations

from collections import Counter

from scheduler.adapters.copies import AdapterCopy
from scheduler.batching.preemption import HeldLane
from scheduler.requests.request import Request
from scheduler.state import SchedulerState


class LanePreemption:
    """The lanes and rank pages that remain available while they are assigned to one request after another."""

    def __init__(self, state: SchedulerState, free_lanes: int) -> None:
        self._state = state
        self._free_lanes = free_lanes
        self._rank_pages = state.device_cache.room()
        self._users: dict[int, int] = {}  # by copy id: how many of its lanes are to be preempted

    def lanes_to_preempt(self, request: Request, candidates: list[HeldLane]) -> list[HeldLane] | None:
        """Returns the lanes to preempt for this request: the least number of `candidates`, taken from the front.

        The lane and rank pages are then assigned to the request. Returns None if all candidates are too few.
        """
        state = self._state
        if request.key in state.lanes:
            return []
        rank_pages, users = dict(self._rank_pages), dict(self._users)
        copies = state.copies(request.key)
        for count in range(len(candidates) + 1):
            if count:
                self._leave(candidates[count - 1], rank_pages, users)
            if self._free_lanes + count > 0 and not state.device_cache.lacking_in(copies, rank_pages):
                for group, need in _needed_pages(copies).items():
                    rank_pages[group] -= need
                self._free_lanes, self._rank_pages, self._users = self._free_lanes + count - 1, rank_pages, users
                return candidates[:count]
        return None

    def _leave(self, lane: HeldLane, rank_pages: dict[str, int], users: dict[int, int]) -> None:
        for copy in self._state.copies(lane.key):
            users[copy.id] = users.get(copy.id, 0) + 1
            if users[copy.id] == copy.device.lanes and not copy.pinned:
                for group, pages in copy.device.pages.items():
                    rank_pages[group] += len(pages)


def _needed_pages(copies: list[AdapterCopy]) -> Counter[str]:
    """Returns by group how many rank pages the copies that are in no lane need."""
    return sum((Counter(copy.pages_needed) for copy in copies if not copy.device.lanes), Counter())
