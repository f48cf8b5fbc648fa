"""What becomes of adapters: loads, unloads and pins that are asked for, and what the runner says. Knows no requests.

The runner knows a copy under one id (its holder). A load under another id that turns out to be the same revision is
freed there again, and its name and waiting requests go to the copy that was first.
"""

from __future__ import annotations

import logging

from msgspec.structs import replace

from engine.messages import AdapterState, LoadAdapter, PinAdapter, UnloadAdapter
from scheduler.adapters.copies import Adapter, Copy, Device, Host
from scheduler.admission import Admission
from scheduler.loading.device_loader import DeviceLoader
from scheduler.loading.disk_loader import DiskLoader
from scheduler.state import SchedulerState

log = logging.getLogger(__name__)


class AdapterLifecycle:
    """Adapters from their first load until they are gone, over the books."""

    def __init__(
        self, state: SchedulerState, admission: Admission, disk_loader: DiskLoader, device_loader: DeviceLoader
    ) -> None:
        self._state = state
        self._admission = admission
        self._device_loader = device_loader
        self._disk_loader = disk_loader

    # ------------------------------------------------------------------------------------------------ what is asked

    def load(self, message: LoadAdapter) -> None:
        """A new adapter; of a known one its state is told, and it is read when it is on disk.

        One that failed stays failed: the tokenizer process sends all it knows again whenever a runner starts, and to
        try the same files again it loads them under a new id.
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
        copy = adapter.copy
        if message.pinned:
            self._pin(adapter, True)
        if message.preload and not copy.on_device and copy.preload_order is None:
            copy.preload_order = state.next_order()
            if copy.can_fill:
                state.queue_fill(copy)
        if copy.device is Device.NONE and copy.host in (Host.DISK, Host.EVICTING):
            self._disk_loader.request_load(copy)
        state.reclassify(copy)

    def unload(self, message: UnloadAdapter) -> None:
        """No new requests; it goes with its last one."""
        adapter = self._state.registry.adapters.get(message.adapter_id)
        if adapter is None:
            self._state.outbox.append(AdapterState(adapter_id=message.adapter_id, state="gone"))
        elif not adapter.draining:
            adapter.draining = True
            self._state.outbox.append(adapter.to_message())
            self._admission.unloader.unload_if_drained(adapter)

    def pin(self, message: PinAdapter) -> None:
        """Never evict it, or evict it again like any other. One that is on disk is read."""
        adapter = self._state.registry.adapters.get(message.adapter_id)
        if adapter is not None:
            self._pin(adapter, message.pinned)
            if message.pinned and adapter.copy.to_load and adapter.copy.error is None:
                self._disk_loader.request_load(adapter.copy)

    # ------------------------------------------------------------------------------------------ what the runner says

    def on_runner_report(self, message: AdapterState) -> None:
        """News of one copy, under the id that the runner knows it by."""
        assert all(0 <= token < 1 << 32 for token in message.invocation), (
            f"the invocation of adapter {message.adapter_id}"
        )
        freed_ids = self._state.registry.freed_ids
        self._state.loads_due = True
        if message.state == "gone" and message.adapter_id in freed_ids:
            freed_ids.discard(message.adapter_id)
            return
        copy = self._state.registry.by_runner_id(message.adapter_id)
        if copy is None:
            if message.state not in ("gone", "disk") and message.adapter_id not in freed_ids:
                log.warning("the runner reports adapter %d as %s, which is unknown", message.adapter_id, message.state)
        elif message.state == "gone":
            self._gone(copy)
        elif message.state == "failed":
            self._failed(copy, message.error or f"adapter {copy.id} failed to load")
        elif message.state == "host" and copy.host is Host.LOADING:
            self._loaded(copy, message)
        elif message.state == "disk" and copy.host is Host.EVICTING:
            self._evicted(copy)
        elif message.state == "resident" and copy.fills:
            self._filled(copy, message.seconds)
        else:
            log.debug("adapter %d is %s, and so says the runner: %s", copy.id, copy.stage, message.state)

    def reset(self) -> None:
        """A new runner holds nothing. What it must know is read again first, then what was here while there is room."""
        state = self._state
        held_before: list[Copy] = []
        self._disk_loader.reset()
        state.registry.freed_ids.clear()
        for copy in list(state.registry.copies.values()):
            if copy.on_host or copy.on_device:
                held_before.append(copy)
            copy.host, copy.device, copy.pages, copy.users, copy.last_step = Host.DISK, Device.NONE, {}, 0, 0
            copy.sent_to_runner, copy.fills = False, 0
            if copy.is_unloading:
                self._admission.unloader.forget(copy)
            elif copy.error is None and (not copy.known or copy.pinned or copy.preload_order is not None):
                self._disk_loader.request_load(copy)
        self._disk_loader.reload_when_room(held_before)
        for adapter in list(state.registry.adapters.values()):
            self._admission.unloader.unload_if_drained(adapter)

    # ----------------------------------------------------------------------------------------------------- private

    def _load_again(self, adapter: Adapter, message: LoadAdapter) -> None:
        """A known id: what is wanted of it now. Its revision, once learnt, stays what its files must hash to."""
        copy = adapter.copy
        if copy.to_load:
            adapter.source = message
            if not copy.known:
                copy.info = replace(copy.info, revision=message.revision)
        if copy.known:
            self._state.outbox.append(adapter.to_message())

    def _pin(self, adapter: Adapter, pinned: bool) -> None:
        self._state.registry.pin(adapter, pinned)
        self._state.reclassify(adapter.copy)

    def _loaded(self, copy: Copy, card: AdapterState) -> None:
        """It is on the host, and all about it is known; one that no pool, lane or host tier could hold is refused."""
        state = self._state
        state.host_cache.hold(copy, card.bytes)
        state.counters.adapter_loads += 1
        copy.info, copy.known = card, True
        into = state.registry.known(copy)
        if into is not copy:
            self._merge(copy, into, card.seconds)
            return
        problem = state.device_cache.limit_error([copy]) or state.host_cache.limit_error([copy])
        if problem is not None:
            self._admission.fail_copy(copy, problem)
            return
        if card.invocation:
            self._admission.rekey(self._admission.withdraw(copy))
        state.queue_fill(copy)
        self._report_available(copy, card.seconds)

    def _merge(self, copy: Copy, into: Copy, seconds: float) -> None:
        """`copy` is the same revision as `into`, which stays. The runner frees one of the two, where it has two."""
        state = self._state
        requests = self._admission.withdraw(copy)
        adopts = into.to_load
        freed = into.runner_id if adopts else copy.runner_id
        if not adopts:
            state.host_cache.lose(copy)
        moved = state.registry.merge(copy, into)
        if adopts:
            state.host_cache.adopt(into, copy)
            state.registry.set_runner_id(into, copy.runner_id)
            into.sent_to_runner = True
        if copy.preload_order is not None and not into.on_device and into.preload_order is None:
            into.preload_order, copy.preload_order = copy.preload_order, None
        state.outbox.append(UnloadAdapter(freed))
        state.registry.freed_ids.add(freed)
        state.outbox += [adapter.to_message(seconds) for adapter in (into.names.values() if adopts else moved)]
        self._admission.rekey(requests)
        self._requeue_merged(into, adopts)

    def _requeue_merged(self, into: Copy, adopts: bool) -> None:
        state = self._state
        state.reclassify(into)
        if adopts:
            self._admission.update_wait_states(into)
        if into.can_fill:
            state.queue_fill(into)
        elif into.preload_order is not None and not into.on_device:
            self._disk_loader.request_load(into)
        self._admission.unloader.unload_drained(into)

    def _report_available(self, copy: Copy, seconds: float) -> None:
        self._state.reclassify(copy)
        self._state.report(copy, seconds)
        self._admission.update_wait_states(copy)
        self._admission.unloader.unload_drained(copy)

    def _filled(self, copy: Copy, seconds: float) -> None:
        """The oldest of its fills that were not answered is done: a background fill is the last of them."""
        copy.fills -= 1
        if copy.fills or copy.device is not Device.FILLING:
            self._device_loader.record_fill_seconds(copy, seconds)
        else:
            self._state.device_cache.filled(copy)
        self._state.reclassify(copy)
        if copy.device is Device.RESIDENT:
            self._report_available(copy, seconds)
        else:  # it lost its pages again meanwhile, and that was told
            self._admission.unloader.unload_drained(copy)

    def _evicted(self, copy: Copy) -> None:
        self._state.host_cache.lose(copy)
        if not copy.is_unloading and copy.error is None:
            if copy.device is Device.NONE:
                self._state.report(copy)
            self._admission.update_wait_states(copy)

    def _failed(self, copy: Copy, reason: str) -> None:
        """A load that failed is tried with the files of another name; a known copy is tried again when asked for."""
        if copy.is_unloading or copy.error is not None:
            return
        loading = copy.host is Host.LOADING
        copy.fills = 0  # its answers come in order: this one is the last
        if loading and self._disk_loader.retry_other_path(copy):
            return
        self._state.host_cache.lose(copy)
        self._admission.fail_copy(copy, reason, final=not (loading and copy.known))

    def _gone(self, copy: Copy) -> None:
        if not copy.is_unloading:
            self._state.host_cache.lose(copy)
            self._admission.fail_copy(copy, f"adapter {copy.id} is gone from the runner")
        if copy.id in self._state.registry.copies:
            self._admission.unloader.forget(copy)
