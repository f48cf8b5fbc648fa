"""Finds the reason why a request waits. Changes no table.

load       its adapter must be loaded from disk, or is being loaded
fill       its adapter is being copied into rank pages, or will be in one of the next steps
rank_pages no rank pages are left for its adapter: running requests use them, or requests that come first in the queue
lanes      no lane is left for its adapter, or its adapter's lane is draining
rows       no row is left
pages      too few KV pages for the first request that lacks nothing else, which no request may overtake
turn       other requests go first, because the number of prompt tokens in a step is limited
trial      the runner died, and the requests that may have caused this run first, one at a time
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

LISTED = 64  # the most waiting requests that `WaitReport.oldest` lists


class WaitReport(NamedTuple):
    """How many requests wait for each reason, and the waiting requests that arrived first."""

    counts: dict[WaitReason, int]
    oldest: list[WaitingRequest]


def wait_reason(state: SchedulerState, request: Request) -> WaitReason | None:
    """Returns why this request waits, or None if it does not wait."""
    if request.done or request.row >= 0 or request.key not in state.waiting:
        return None
    return _reason_of_key(state, request.key, state.device_cache.room(), _reason_of_runnable(state))


def wait_report(state: SchedulerState) -> WaitReport:
    """Returns the wait reasons of all waiting requests: counts for all, and a list of the first LISTED by arrival.

    All waiting requests of a key have the same reason, so only keys, running requests and the listed ones are visited.

    state.requests    r1  W2  r3  W4  W5 | W6  W7 ...      by arrival (r: running, W: waiting)
                      the first LISTED W are listed
    """
    room, runnable = state.device_cache.room(), _reason_of_runnable(state)
    reasons = {key: _reason_of_key(state, key, room, runnable) for key in state.waiting.lane_keys()}
    counts: Counter[WaitReason] = Counter()
    for key, reason in reasons.items():
        counts[reason] += state.waiting.count(key)
    waiting = (request for request in state.requests.values() if request.row < 0)
    oldest = [
        WaitingRequest(request.id, max(0.0, state.now - request.queued_at), reasons[request.key], request.generated)
        for request in islice(waiting, LISTED)
    ]
    return WaitReport(dict(counts), oldest)


def _reason_of_runnable(state: SchedulerState) -> WaitReason:
    """Returns the wait reason of requests whose adapters lack nothing. The first of them in the queue determines it."""
    if not state.running.free:
        return "rows"
    runnable = (WaitState.ACTIVE, WaitState.READY) if state.lanes.free else (WaitState.ACTIVE,)
    heads = [head for wait_state in runnable if (head := state.waiting.first(wait_state)) is not None]
    if not heads:
        return "turn"
    first, running = min(heads, key=lambda request: request.order), len(state.running)
    if len(first.tokens) // state.capacity.page_size + 1 + running <= state.kv.free:
        return "turn"  # there are enough KV pages even if it shares no cached prefix
    return "turn" if state.kv.can_allocate(first, state.owner(first.key), running) else "pages"


def _reason_of_key(
    state: SchedulerState, key: LaneKey, room: Mapping[str, int], runnable_reason: WaitReason
) -> WaitReason:
    wait_state = state.waiting.state_of(key)
    if wait_state is WaitState.DISK:
        return "load"
    if wait_state is WaitState.BLOCKED:
        return "fill" if all(copy.on_device or copy.can_fill for copy in state.copies(key)) else "load"
    if len(state.blame):
        return "trial"
    if wait_state is WaitState.DRAINING or (wait_state is not WaitState.ACTIVE and not state.lanes.free):
        return "lanes"
    if wait_state is WaitState.COLD:
        return "rank_pages" if state.device_cache.lacking_in(state.copies(key), room) else "fill"
    return runnable_reason
