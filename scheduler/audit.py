"""Asserts that the scheduler's tables agree: all pages, rows, lanes, references and queue entries are accounted for.

Changes nothing. A failed assertion means a bug of the scheduler.
"""

from __future__ import annotations

from collections import Counter

from scheduler.adapters.copies import AdapterCopy, DeviceState, HostState
from scheduler.requests.queue import WaitState
from scheduler.requests.request import Request
from scheduler.state import SchedulerState
from scheduler.types import BASE, LaneKey


def audit(state: SchedulerState, kv_pages: int | None = None) -> None:
    """Raises AssertionError, which says what is wrong, if the tables disagree.

    `kv_pages` limits the work: if there are more KV pages, each call checks only their sums and the next `kv_pages`
    nodes of the radix tree. None: all pages are checked.
    """
    state.running.audit()
    state.waiting.audit()
    running = state.running.ordered
    state.kv.audit(running, kv_pages)
    state.lanes.audit((request.key, request.lane) for request in running)
    _audit_adapters(state)
    assert set(state.draining) <= set(state.lanes.active()), "a lane is draining that is free"
    _audit_requests(state)
    _audit_blame(state)
    _audit_in_flight(state)
    for key in state.waiting.lane_keys():
        _audit_wait_state(state, key, state.waiting.state_of(key))


def _audit_adapters(state: SchedulerState) -> None:
    requests = state.requests.values()
    names = Counter(adapter_id for request in requests for adapter_id in request.adapter_ids)
    needed = Counter(copy_id for request in requests for copy_id, _ in request.key)
    lanes = Counter(copy_id for key in state.lanes.active() for copy_id, _ in key)
    copies = state.registry.copies.values()
    state.registry.audit(names, needed)
    state.device_cache.audit(copies, lanes)
    state.host_cache.audit(copies)


def _audit_requests(state: SchedulerState) -> None:
    running, waiting = {r.id for r in state.running.ordered}, [r.id for r in state.waiting]
    assert len(waiting) == len(set(waiting)), "a request waits twice"
    assert not running & set(waiting), "a request runs and waits"
    assert running | set(waiting) == set(state.requests), "a request is lost"
    for request in state.running.ordered:
        room = len(request.pages) * state.capacity.page_size
        assert request.computed <= room, f"request {request.id} computed {request.computed} in room for {room}"
        assert request.computed <= len(request.tokens) + request.pending, f"request {request.id} ran ahead"
    for request in state.waiting:
        assert request.row < 0, f"request {request.id} waits with a row"
        assert not request.pages, f"request {request.id} waits with pages"


def _audit_blame(state: SchedulerState) -> None:
    running = {request.id for request in state.running.ordered}
    suspects = set(state.blame)
    assert suspects <= set(state.requests), "a suspect has ended"
    assert not suspects or running <= suspects, "other requests run beside a suspect"
    assert not suspects or len(running) <= 1, "suspects run together"


def _audit_in_flight(state: SchedulerState) -> None:
    steps: Counter[Request] = Counter()
    samples: Counter[Request] = Counter()
    for step in state.in_flight:
        for request, sampling, _ in step.parts:
            steps[request] += 1
            samples[request] += sampling
    for request in state.requests.values():
        counted = request.steps_in_flight
        assert counted == steps[request], f"request {request.id} counts {counted} steps in flight"
        assert request.pending == samples[request], f"request {request.id} counts {request.pending} pending"


def _audit_wait_state(state: SchedulerState, key: LaneKey, wait_state: WaitState) -> None:
    copies = state.copies(key)
    if wait_state in (WaitState.ACTIVE, WaitState.DRAINING):
        assert key == BASE or key in state.lanes, f"key {key} is active without a lane"
        assert (key in state.draining) == (wait_state is WaitState.DRAINING), f"key {key} drains and does not"
    elif wait_state is WaitState.READY:
        assert key not in state.lanes, f"key {key} waits for the lane that it has"
        assert all(_is_resident(copy) for copy in copies), f"key {key} is ready and not resident"
    elif wait_state is WaitState.COLD:
        assert any(not copy.on_device for copy in copies), f"key {key} is cold and has pages"
        held = all(copy.on_device or copy.host.state is HostState.HELD for copy in copies)
        assert held, f"key {key} is cold and not on the host"
    elif wait_state is WaitState.DISK:
        assert any(copy.needs_load for copy in copies), f"key {key} waits for a load that it does not need"
    else:
        assert all(not copy.needs_load for copy in copies), f"key {key} is blocked, and its load does not begin"
        busy = [copy for copy in copies if not _is_resident(copy) and not copy.can_fill]
        assert busy, f"key {key} is blocked, and nothing is under way"


def _is_resident(copy: AdapterCopy) -> bool:
    return copy.device.state is DeviceState.RESIDENT
