"""Why a waiting request waits: a pure reading of the books.

load       an adapter is to be read from disk, or is being read
fill       an adapter is being copied into rank pages, or will be in one of the next steps
rank_pages its adapter finds no rank pages: those who are before it or run use them
lanes      its adapter finds no lane, or its lane makes way for another
rows       the step has no row left
pages      KV pages are lacking for the first who could go, and nobody passes him
turn       others go first: a step takes only so many prompt tokens
trial      a runner died, and those who may have ended it run alone first
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from itertools import islice
from typing import NamedTuple

from engine.messages import WaitingRequest, WaitReason
from scheduler.requests.queue import WaitState
from scheduler.requests.request import Request
from scheduler.state import SchedulerState
from scheduler.types import LaneKey

LISTED = 64  # requests that are told of one by one


class WaitReport(NamedTuple):
    """How many requests wait, by reason; and the oldest of them."""

    counts: dict[WaitReason, int]
    oldest: list[WaitingRequest]


def wait_reason(state: SchedulerState, request: Request) -> WaitReason | None:
    """Why this request waits; None if it does not."""
    if request.done or request.row >= 0 or request.key not in state.waiting:
        return None
    return _of_key(state, request.key, state.device_cache.room(), _last_want(state))


def report(state: SchedulerState) -> WaitReport:
    """Everyone who waits. Costs a look at each key, at who runs, and at as many requests as are listed.

    state.requests    r1  W2  r3  W4  W5 | W6  W7 ...      by arrival: those who waited longest come first
                          LISTED at most
    """
    room, last = state.device_cache.room(), _last_want(state)
    reasons = {key: _of_key(state, key, room, last) for key in state.waiting.lane_keys()}
    counts: Counter[WaitReason] = Counter()
    for key, reason in reasons.items():
        counts[reason] += state.waiting.count(key)
    waiting = (request for request in state.requests.values() if request.row < 0)
    oldest = [
        WaitingRequest(request.id, max(0.0, state.now - request.queued_at), reasons[request.key], request.generated)
        for request in islice(waiting, LISTED)
    ]
    return WaitReport(dict(counts), oldest)


def _last_want(state: SchedulerState) -> WaitReason:
    """What those wait for who have all that their adapters need: the first of them is not passed."""
    if not state.running.free:
        return "rows"
    places = (WaitState.ACTIVE, WaitState.READY) if state.lanes.free else (WaitState.ACTIVE,)
    heads = [head for place in places if (head := state.waiting.first(place)) is not None]
    if not heads:
        return "turn"
    first, running = min(heads, key=lambda request: request.order), len(state.running)
    if len(first.tokens) // state.capacity.page_size + 1 + running <= state.kv.free:
        return "turn"  # whatever of its prefix is found, or is just being computed
    return "turn" if state.kv.can_allocate(first, state.owner(first.key), running) else "pages"


def _of_key(state: SchedulerState, key: LaneKey, room: Mapping[str, int], last: WaitReason) -> WaitReason:
    place = state.waiting.state_of(key)
    if place is WaitState.DISK:
        return "load"
    if place is WaitState.BLOCKED:
        return "fill" if all(copy.on_device or copy.can_fill for copy in state.copies(key)) else "load"
    if len(state.blame):
        return "trial"
    if place is WaitState.DRAINING or (place is not WaitState.ACTIVE and not state.lanes.free):
        return "lanes"
    if place is WaitState.COLD:
        return "rank_pages" if state.device_cache.lacking_in(state.copies(key), room) else "fill"
    return last
