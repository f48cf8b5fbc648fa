"""Handles loads, unloads and pins of adapters by the client, and the runner's reports about them.

The runner knows a copy under one id (`runner_id`). A load under another id may turn out to have the revision of an
existing copy: the runner then frees the duplicate, and its names and waiting requests move to the copy that was first.
"""

from __future__ import annotations

import logging

from engine.messages import AdapterState, LoadAdapter, PinAdapter, UnloadAdapter
from scheduler.adapters import device_limits
from scheduler.adapters.copies import Adapter, AdapterCopy, DeviceState, HostState
from scheduler.admission.admission import Admission
from scheduler.loading.device_loader import DeviceLoader
from scheduler.loading.disk_loader import DiskLoader
from scheduler.state import SchedulerState

log = logging.getLogger(__name__)


class AdapterLifecycle:
    """Changes the states of adapters, from their first load until they are gone."""

    def __init__(
        self, state: SchedulerState, admission: Admission, disk_loader: DiskLoader, device_loader: DeviceLoader
    ) -> None:
        self._state = state
        self._admission = admission
        self._unloader = admission.unloader
        self._disk_loader = disk_loader
        self._device_loader = device_loader

    # --------------------------------------------------------------------------------------------- from the client

    def load(self, message: LoadAdapter) -> None:
        """Adds and loads a new adapter. A known adapter is reported, and loaded again if it is on disk.

        An adapter that failed stays failed: the tokenizer process sends LoadAdapter for all its adapters again whenever
        a runner starts, and uses a new id to retry the same files.
        """
        state = self._state
        adapter = state.registry.adapters.get(message.adapter_id)
        if adapter is None:
            adapter = state.registry.add(message)
            if adapter is None:
                error = f"adapter id {message.adapter_id} was used before; give the adapter a new one"
                state.outbox.append(AdapterState(adapter_id=message.adapter_id, state="failed", error=error))
                return
        elif adapter.draining or adapter.copy.error is not None:
            state.outbox.append(adapter.to_message())
            return
        else:
            self._load_again(adapter, message)
        if message.pinned != adapter.pinned:  # the former tokenizer process may have died before it sent PinAdapter
            self._pin(adapter, message.pinned)
        self._want(adapter.copy, message.preload)

    def unload(self, message: UnloadAdapter) -> None:
        """Lets the adapter drain: it accepts no new requests, and is removed when its last request ends."""
        adapter = self._state.registry.adapters.get(message.adapter_id)
        if adapter is None:
            self._state.outbox.append(AdapterState(adapter_id=message.adapter_id, state="gone"))
        elif not adapter.draining:
            self._state.registry.start_draining(adapter)
            self._state.outbox.append(adapter.to_message())
            self._unloader.unload_if_drained(adapter)

    def pin(self, message: PinAdapter) -> None:
        """Pins or unpins an adapter. A pinned adapter is loaded if it is on disk, and is not evicted."""
        adapter = self._state.registry.adapters.get(message.adapter_id)
        if adapter is not None:
            self._pin(adapter, message.pinned)
            if message.pinned and adapter.copy.needs_load and adapter.copy.error is None:
                self._disk_loader.request_load(adapter.copy)

    # --------------------------------------------------------------------------------------------- from the runner

    def on_runner_report(self, message: AdapterState) -> None:
        """Handles the runner's report of the state of one copy, which the message names by its runner id."""
        assert all(0 <= token < 1 << 32 for token in message.invocation), (
            f"the invocation of adapter {message.adapter_id}"
        )
        freed_ids = self._state.registry.freed_ids
        self._state.loads_due = True
        if message.state == "gone" and message.adapter_id in freed_ids:
            freed_ids.discard(message.adapter_id)
            return
        copy = self._state.registry.by_runner_id(message.adapter_id)
        if copy is not None:
            self._on_copy_report(copy, message)
        elif message.state not in ("gone", "disk") and message.adapter_id not in freed_ids:
            log.warning("the runner reports adapter %d as %s, which is unknown", message.adapter_id, message.state)

    def runner_replaced(self, held: list[AdapterCopy]) -> None:
        """Loads copies again for a new runner, which holds nothing.

        First loads the copies that were never loaded, are pinned or have a preload, and then the copies in `held`,
        which the old runner held, while there is room.
        """
        state = self._state
        self._disk_loader.reset()
        state.registry.freed_ids.clear()
        for copy in list(state.registry.copies.values()):
            if copy.is_unloading:
                self._unloader.forget(copy)
            elif copy.error is None:
                preload = copy.references.preload_order is not None
                if not copy.loaded_once or copy.pinned or preload:
                    self._disk_loader.request_load(copy)
        self._disk_loader.reload_into_free_room(held)
        for adapter in list(state.registry.adapters.values()):
            self._unloader.unload_if_drained(adapter)

    # ----------------------------------------------------------------------------------------------------- private

    def _load_again(self, adapter: Adapter, message: LoadAdapter) -> None:
        """Handles LoadAdapter with a known id: takes over its path if the copy must be loaded.

        If a load has already reported the copy's revision, the files at the path must have this revision.
        """
        copy = adapter.copy
        if copy.needs_load:
            self._state.registry.set_source(adapter, message)
        if copy.loaded_once:
            self._state.outbox.append(adapter.to_message())

    def _want(self, copy: AdapterCopy, preload: bool) -> None:
        """Requests the load of a copy that a client asked for, and with `preload` also its fill."""
        state = self._state
        if preload and not copy.on_device and copy.references.preload_order is None:
            state.registry.set_preload(copy, state.next_order())
            if copy.can_fill:
                state.queue_fill(copy)
        if not copy.on_device and copy.host.state in (HostState.DISK, HostState.EVICTING):
            self._disk_loader.request_load(copy)
        state.reclassify([copy])

    def _pin(self, adapter: Adapter, pinned: bool) -> None:
        self._state.registry.pin(adapter, pinned)
        self._state.reclassify([adapter.copy])

    def _on_copy_report(self, copy: AdapterCopy, message: AdapterState) -> None:
        if message.state == "gone":
            self._on_gone(copy)
        elif message.state == "failed":
            self._state.registry.set_server_fault(copy, message.server_fault)
            self._on_failed(copy, message.error or f"adapter {copy.id} failed to load")
        elif message.state == "host" and copy.host.state is HostState.LOADING:
            self._on_loaded(copy, message)
        elif message.state == "disk" and copy.host.state is HostState.EVICTING:
            self._on_evicted(copy)
        elif message.state == "resident" and copy.device.fills_in_flight:
            self._on_filled(copy, message.seconds)
        else:
            log.debug("adapter %d is %s, and the runner reports %s", copy.id, copy.stage, message.state)

    def _on_loaded(self, copy: AdapterCopy, info: AdapterState) -> None:
        """Handles the end of a load: `info` describes the copy completely. A copy that exceeds a limit fails."""
        state = self._state
        state.host_cache.finish_load(copy, info.bytes)
        state.counters.adapter_loads += 1
        state.registry.set_info(copy, info)
        into = state.registry.share_revision(copy)
        if into is not copy:
            self._merge(copy, into, info.seconds)
            return
        error = device_limits.limit_error([copy], state.capacity) or state.host_cache.limit_error([copy])
        if error is not None:
            self._admission.fail_copy(copy, error)
            return
        if info.invocation:
            self._admission.rekey(self._admission.withdraw(copy))
        state.queue_fill(copy)
        self._admission.changed([copy], report=True, seconds=info.seconds)
        self._unloader.unload_drained(copy)

    def _merge(self, copy: AdapterCopy, into: AdapterCopy, seconds: float) -> None:
        """Merges `copy` into `into`, which has the same revision. The runner frees the duplicate.

        If `into` is on disk, it takes over the host memory and the runner id of `copy`.
        """
        state = self._state
        requests = self._admission.withdraw(copy)
        adopts = into.needs_load
        freed_id = into.runner_id if adopts else copy.runner_id
        state.reclassify(state.host_cache.adopt(into, copy) if adopts else state.host_cache.remove(copy))
        moved = state.registry.merge(copy, into)
        if adopts:
            state.registry.set_runner_id(into, copy.runner_id)
        preload_order = copy.references.preload_order
        if preload_order is not None and not into.on_device and into.references.preload_order is None:
            state.registry.set_preload(into, preload_order)
        state.outbox.append(UnloadAdapter(freed_id))
        state.registry.freed_ids.add(freed_id)
        state.outbox += [adapter.to_message(seconds) for adapter in (into.names.values() if adopts else moved)]
        self._admission.rekey(requests)
        self._after_merge(into)

    def _after_merge(self, into: AdapterCopy) -> None:
        state = self._state
        self._admission.changed([into])
        if into.can_fill:
            state.queue_fill(into)
        elif into.references.preload_order is not None and not into.on_device:
            self._disk_loader.request_load(into)
        self._unloader.unload_drained(into)

    def _on_filled(self, copy: AdapterCopy, seconds: float) -> None:
        """Handles the end of the copy's oldest fill in flight."""
        if not self._state.device_cache.answer_fill(copy):
            self._device_loader.record_fill_seconds(copy, seconds)
        if copy.device.state is DeviceState.RESIDENT:
            self._admission.changed([copy], report=True, seconds=seconds)
        else:  # the copy lost its pages in the meantime, which was reported
            self._state.reclassify([copy])
        self._unloader.unload_drained(copy)

    def _on_evicted(self, copy: AdapterCopy) -> None:
        removed = self._state.host_cache.remove(copy)
        if copy.is_unloading or copy.error is not None:
            self._state.reclassify(removed)
        else:
            self._admission.changed(removed, report=not copy.on_device)

    def _on_failed(self, copy: AdapterCopy, reason: str) -> None:
        """Handles a failed load or fill. A failed load is sent again with the path of another name, if there is one.

        Otherwise ends the requests that need the copy. A copy whose load failed, but that was loaded once before, is
        loaded again when the next request needs it.
        """
        state = self._state
        if copy.is_unloading or copy.error is not None:
            return
        loading = copy.host.state is HostState.LOADING
        state.device_cache.drop_fills(copy)
        if loading and self._disk_loader.retry_other_path(copy):
            return
        state.host_cache.remove(copy)
        self._admission.fail_copy(copy, reason, final=not (loading and copy.loaded_once))

    def _on_gone(self, copy: AdapterCopy) -> None:
        if not copy.is_unloading:
            self._state.host_cache.remove(copy)
            self._admission.fail_copy(copy, f"adapter {copy.id} is gone from the runner")
        if copy.id in self._state.registry.copies:
            self._unloader.forget(copy)
