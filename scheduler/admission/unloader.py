"""Unloads a draining adapter (a name) after its last request ended, and a copy together with its last name."""

from __future__ import annotations

from msgspec.structs import replace

from engine.messages import UnloadAdapter
from scheduler.adapters.copies import Adapter, AdapterCopy, HostState
from scheduler.state import SchedulerState


class Unloader:
    """Removes names and copies from the scheduler's tables, and lets the runner free the copies."""

    def __init__(self, state: SchedulerState) -> None:
        self._state = state

    def unload_if_drained(self, adapter: Adapter) -> None:
        """Unloads a name if it is draining and has no requests.

        The last name of a copy is unloaded together with the copy, and only if no load or fill of it is in flight.
        """
        state, copy = self._state, adapter.copy
        if not adapter.draining or adapter.requests or copy.is_unloading:
            return
        if len(copy.names) > 1:
            self._remove_name(adapter)
            state.reclassify([copy])
        elif copy.host.state is not HostState.LOADING and not copy.device.fills_in_flight:
            self._unload(copy)

    def unload_drained(self, copy: AdapterCopy) -> None:
        """Unloads each name of the copy that is draining and has no requests."""
        for adapter in list(copy.names.values()):
            self.unload_if_drained(adapter)

    def forget(self, copy: AdapterCopy) -> None:
        """Removes the copy and all its names from the tables, and reports each name as gone."""
        state = self._state
        state.device_cache.free([copy])
        state.host_cache.remove(copy)
        for adapter in list(copy.names.values()):
            self._remove_name(adapter)
        state.reclassify([copy])
        state.registry.remove(copy)

    def _unload(self, copy: AdapterCopy) -> None:
        """Lets the runner free the copy. It is removed when the runner reports it gone, or at once if it is on disk."""
        state = self._state
        takes_room = copy.on_host or copy.on_device
        state.device_cache.free([copy])
        state.drop_revision(copy)
        state.registry.mark_unloading(copy)
        state.reclassify([copy])
        if copy.host.known_to_runner:
            state.outbox.append(UnloadAdapter(copy.runner_id))
        if not takes_room:
            if copy.host.known_to_runner:
                state.registry.freed_ids.add(copy.runner_id)  # the runner's "gone" is to be ignored
            self.forget(copy)

    def _remove_name(self, adapter: Adapter) -> None:
        self._state.registry.remove_name(adapter)
        gone = replace(adapter.copy.info, adapter_id=adapter.id, state="gone", error=None, seconds=0.0)
        self._state.outbox.append(gone)
