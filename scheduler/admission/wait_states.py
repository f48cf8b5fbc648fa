"""Determines what the requests of a lane key need before they can run, or why they never can. Changes no table."""

from __future__ import annotations

from collections.abc import Sequence

from scheduler.adapters import device_limits
from scheduler.adapters.copies import AdapterCopy, DeviceState, HostState
from scheduler.requests.queue import WaitState
from scheduler.state import SchedulerState
from scheduler.types import BASE, LaneKey

MAX_SCALE = 1e38  # the largest sum of absolute scales, which is still finite in float32

MIXED_INVOCATION = "an adapter that acts from its invocation on (alora_invocation_tokens) cannot be mixed with others"


def selection_error(state: SchedulerState, lora: Sequence[tuple[int, float]]) -> str | None:
    """Returns why a request cannot select these (adapter id, scale) pairs, or None if it can."""
    if not sum(abs(scale) for _, scale in lora) <= MAX_SCALE:  # also false for NaN
        return f"the scales of the adapters must be finite, and add up to at most {MAX_SCALE:g}"
    for adapter_id, _ in lora:
        adapter = state.registry.adapters.get(adapter_id)
        if adapter_id and not state.lanes.count:
            return "LoRA is not enabled; start with --enable-lora"
        if adapter_id and adapter is None:
            return f"adapter {adapter_id} is not loaded; load it first"
        if adapter is not None and adapter.draining:
            return f"adapter {adapter_id} is being unloaded"
    return None


def unservable_reason(state: SchedulerState, key: LaneKey) -> str | None:
    """Returns why requests of this key can never be served (by what is known now), or None if they can."""
    if key == BASE:
        return None
    copies = state.copies(key)
    if len(copies) > 1 and any(copy.info.invocation for copy in copies):
        return MIXED_INVOCATION
    error = device_limits.limit_error(copies, state.capacity)
    if error is None and not all(copy.on_device for copy in copies):
        error = state.host_cache.limit_error(copies)
    return error


def wait_state(state: SchedulerState, key: LaneKey) -> WaitState:
    """Returns what the waiting requests of a key need next. The key must have no `unservable_reason`."""
    if key == BASE or key in state.lanes:
        return WaitState.DRAINING if key in state.draining else WaitState.ACTIVE
    return _without_lane(state.copies(key))


def _without_lane(copies: Sequence[AdapterCopy]) -> WaitState:
    if any(copy.needs_load for copy in copies):
        return WaitState.DISK
    missing = [copy for copy in copies if not copy.on_device]
    if any(copy.host.state is not HostState.HELD for copy in missing):
        return WaitState.BLOCKED
    if missing:
        return WaitState.COLD
    filling = any(copy.device.state is DeviceState.FILLING for copy in copies)
    return WaitState.BLOCKED if filling else WaitState.READY
