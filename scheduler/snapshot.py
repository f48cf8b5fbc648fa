"""Builds the Stats message: what runs and waits now, and the counters since the start."""

from __future__ import annotations

from collections import Counter

from engine.messages import Stats
from scheduler.adapters.copies import DeviceState
from scheduler.admission import wait_reasons
from scheduler.state import SchedulerState


def take_stats(state: SchedulerState) -> Stats:
    """Returns the Stats of this moment. Takes the step times out of the counters: each is in one Stats message only."""
    counters = state.counters
    adapters = state.registry.adapters.values()
    running = Counter(adapter_id for request in state.running.ordered for adapter_id in request.adapter_ids)
    waiting = {a.id: a.requests - running[a.id] for a in adapters if a.requests > running[a.id]}
    report = wait_reasons.wait_report(state)
    return Stats(
        running=len(state.running),
        waiting=len(state.waiting),
        kv_pages_used=state.kv.used,
        kv_pages=state.kv.block_pool.count,
        rank_pages_used=state.device_cache.rank_pages.used(),
        resident=[a.id for a in adapters if a.copy.device.state is DeviceState.RESIDENT],
        running_adapters=dict(running),
        waiting_adapters=waiting,
        steps=counters.steps,
        preemptions=counters.preemptions,
        prompt_tokens=counters.prompt_tokens,
        generation_tokens=counters.generation_tokens,
        adapter_hits=counters.adapter_hits,
        adapter_fills=counters.adapter_fills,
        adapter_evictions=counters.adapter_evictions,
        adapter_loads=counters.adapter_loads,
        host_adapters=len(state.host_cache.held),
        host_bytes=state.host_cache.bytes,
        host_evictions=counters.host_evictions,
        audits=counters.audits,
        step_seconds=counters.pop_step_seconds(),
        cached_tokens=counters.cached_tokens,
        kv_pages_cached=len(state.kv.radix_cache),
        kv_evictions=state.kv.evictions,
        waiting_reasons=report.counts,
        oldest_waiting=report.oldest,
        lane_preemptions=counters.lane_preemptions,
    )
