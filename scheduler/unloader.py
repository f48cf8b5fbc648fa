"""How names and copies leave: a draining name after its last request, a copy with its last name. Knows no queue."""

from __future__ import annotations

from msgspec.structs import replace

from engine.messages import UnloadAdapter
from scheduler.adapters.copies import Adapter, Copy, Host
from scheduler.state import SchedulerState


class Unloader:
    """The way out for adapters, over the books."""

    def __init__(self, state: SchedulerState) -> None:
        self._state = state

    def unload_if_drained(self, adapter: Adapter) -> None:
        """Lets a draining name go after its last request, and with the last name its copy, if nobody reads it."""
        state, copy = self._state, adapter.copy
        if not adapter.draining or adapter.requests or copy.is_unloading:
            return
        if len(copy.names) > 1:
            self._let_go(adapter)
            state.reclassify(copy)
            return
        if copy.host is Host.LOADING or copy.fills:
            return
        there = copy.on_host or copy.on_device
        state.device_cache.free(copy)
        state.drop_revision(copy)
        copy.is_unloading, copy.preload_order = True, None
        state.reclassify(copy)
        if copy.sent_to_runner:
            state.outbox.append(UnloadAdapter(copy.runner_id))
        if not there:
            if copy.sent_to_runner:
                state.registry.freed_ids.add(
                    copy.runner_id
                )  # its answer is nobody's, not that of whoever has the id next
            self.forget(copy)  # nothing to wait for

    def unload_drained(self, copy: Copy) -> None:
        """The same for each of its names."""
        for adapter in list(copy.names.values()):
            self.unload_if_drained(adapter)

    def forget(self, copy: Copy) -> None:
        """The copy is gone with all its names, and that is told."""
        state = self._state
        state.device_cache.free(copy)
        state.host_cache.lose(copy)
        for adapter in list(copy.names.values()):
            self._let_go(adapter)
        state.registry.drop(copy)
        state.loads_due = True

    def _let_go(self, adapter: Adapter) -> None:
        self._state.registry.detach(adapter)
        self._state.outbox.append(
            replace(adapter.copy.info, adapter_id=adapter.id, state="gone", error=None, seconds=0.0)
        )
