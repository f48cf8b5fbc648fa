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
from scheduler.loading.device_loader import Filling
from scheduler.loading.disk_loader import Loading
from scheduler.state import Books

log = logging.getLogger(__name__)


class Custody:
    """Adapters from their first load until they are gone, over the books."""

    def __init__(self, books: Books, admission: Admission, loading: Loading, filling: Filling) -> None:
        self._books = books
        self._admission = admission
        self._filling = filling
        self._loading = loading

    # ------------------------------------------------------------------------------------------------ what is asked

    def load(self, message: LoadAdapter) -> None:
        """A new adapter; of a known one its state is told, and it is read when it is on disk.

        One that failed stays failed: the tokenizer process sends all it knows again whenever a runner starts, and to
        try the same files again it loads them under a new id.
        """
        books = self._books
        adapter = books.directory.adapters.get(message.adapter_id)
        if adapter is None:
            adapter = books.directory.add(message)
            if adapter is None:
                error = f"adapter id {message.adapter_id} was used before; give the adapter a new one"
                books.news.append(AdapterState(adapter_id=message.adapter_id, state="failed", error=error))
                return
        elif adapter.draining or adapter.copy.error is not None:
            books.news.append(adapter.report())
            return
        else:
            self._again(adapter, message)
        copy = adapter.copy
        if message.pinned:
            self._pin(adapter, True)
        if message.preload and not copy.on_device and copy.wish is None:
            copy.wish = books.next_order()
            if copy.can_fill:
                books.offer(copy)
        if copy.device is Device.NONE and copy.host in (Host.DISK, Host.EVICTING):
            self._loading.ask(copy)
        books.rest(copy)

    def unload(self, message: UnloadAdapter) -> None:
        """No new requests; it goes with its last one."""
        adapter = self._books.directory.adapters.get(message.adapter_id)
        if adapter is None:
            self._books.news.append(AdapterState(adapter_id=message.adapter_id, state="gone"))
        elif not adapter.draining:
            adapter.draining = True
            self._books.news.append(adapter.report())
            self._admission.unloading.unload_if_drained(adapter)

    def pin(self, message: PinAdapter) -> None:
        """Never evict it, or evict it again like any other. One that is on disk is read."""
        adapter = self._books.directory.adapters.get(message.adapter_id)
        if adapter is not None:
            self._pin(adapter, message.pinned)
            if message.pinned and adapter.copy.to_load and adapter.copy.error is None:
                self._loading.ask(adapter.copy)

    # ------------------------------------------------------------------------------------------ what the runner says

    def hear(self, message: AdapterState) -> None:
        """News of one copy, under the id that the runner knows it by."""
        assert all(0 <= token < 1 << 32 for token in message.invocation), (
            f"the invocation of adapter {message.adapter_id}"
        )
        freeing = self._books.directory.freeing
        self._books.stirred = True
        if message.state == "gone" and message.adapter_id in freeing:
            freeing.discard(message.adapter_id)
            return
        copy = self._books.directory.held_as(message.adapter_id)
        if copy is None:
            if message.state not in ("gone", "disk") and message.adapter_id not in freeing:
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
        books = self._books
        former: list[Copy] = []
        self._loading.forget_all()
        books.directory.freeing.clear()
        for copy in list(books.directory.copies.values()):
            if copy.on_host or copy.on_device:
                former.append(copy)
            copy.host, copy.device, copy.pages, copy.users, copy.last_step = Host.DISK, Device.NONE, {}, 0, 0
            copy.sent, copy.fills = False, 0
            if copy.leaving:
                self._admission.unloading.forget(copy)
            elif copy.error is None and (not copy.known or copy.pinned or copy.wish is not None):
                self._loading.ask(copy)
        self._loading.recall(former)
        for adapter in list(books.directory.adapters.values()):
            self._admission.unloading.unload_if_drained(adapter)

    # ----------------------------------------------------------------------------------------------------- private

    def _again(self, adapter: Adapter, message: LoadAdapter) -> None:
        """A known id: what is wanted of it now. Its revision, once learnt, stays what its files must hash to."""
        copy = adapter.copy
        if copy.to_load:
            adapter.source = message
            if not copy.known:
                copy.card = replace(copy.card, revision=message.revision)
        if copy.known:
            self._books.news.append(adapter.report())

    def _pin(self, adapter: Adapter, pinned: bool) -> None:
        self._books.directory.pin(adapter, pinned)
        self._books.rest(adapter.copy)

    def _loaded(self, copy: Copy, card: AdapterState) -> None:
        """It is on the host, and all about it is known; one that no pool, lane or host tier could hold is refused."""
        books = self._books
        books.host.hold(copy, card.bytes)
        books.counters.adapter_loads += 1
        copy.card, copy.known = card, True
        into = books.directory.known(copy)
        if into is not copy:
            self._merge(copy, into, card.seconds)
            return
        problem = books.residency.problem([copy]) or books.host.too_large([copy])
        if problem is not None:
            self._admission.fail(copy, problem)
            return
        if card.invocation:
            self._admission.rekey(self._admission.withdraw(copy))
        books.offer(copy)
        self._came(copy, card.seconds)

    def _merge(self, copy: Copy, into: Copy, seconds: float) -> None:
        """`copy` is the same revision as `into`, which stays. The runner frees one of the two, where it has two."""
        books = self._books
        requests = self._admission.withdraw(copy)
        adopts = into.to_load
        freed = into.holder if adopts else copy.holder
        if not adopts:
            books.host.lose(copy)
        moved = books.directory.merge(copy, into)
        if adopts:
            books.host.adopt(into, copy)
            books.directory.rehold(into, copy.holder)
            into.sent = True
        if copy.wish is not None and not into.on_device and into.wish is None:
            into.wish, copy.wish = copy.wish, None
        books.news.append(UnloadAdapter(freed))
        books.directory.freeing.add(freed)
        books.news += [adapter.report(seconds) for adapter in (into.names.values() if adopts else moved)]
        self._admission.rekey(requests)
        self._settle_merged(into, adopts)

    def _settle_merged(self, into: Copy, adopts: bool) -> None:
        books = self._books
        books.rest(into)
        if adopts:
            self._admission.settle_copy(into)
        if into.can_fill:
            books.offer(into)
        elif into.wish is not None and not into.on_device:
            self._loading.ask(into)
        self._admission.unloading.unload_drained(into)

    def _came(self, copy: Copy, seconds: float) -> None:
        self._books.rest(copy)
        self._books.tell(copy, seconds)
        self._admission.settle_copy(copy)
        self._admission.unloading.unload_drained(copy)

    def _filled(self, copy: Copy, seconds: float) -> None:
        """The oldest of its fills that were not answered is done: a background fill is the last of them."""
        copy.fills -= 1
        if copy.fills or copy.device is not Device.FILLING:
            self._filling.fill_took(copy, seconds)
        else:
            self._books.residency.filled(copy)
        self._books.rest(copy)
        if copy.device is Device.RESIDENT:
            self._came(copy, seconds)
        else:  # it lost its pages again meanwhile, and that was told
            self._admission.unloading.unload_drained(copy)

    def _evicted(self, copy: Copy) -> None:
        self._books.host.lose(copy)
        if not copy.leaving and copy.error is None:
            if copy.device is Device.NONE:
                self._books.tell(copy)
            self._admission.settle_copy(copy)

    def _failed(self, copy: Copy, reason: str) -> None:
        """A load that failed is tried with the files of another name; a known copy is tried again when asked for."""
        if copy.leaving or copy.error is not None:
            return
        loading = copy.host is Host.LOADING
        copy.fills = 0  # its answers come in order: this one is the last
        if loading and self._loading.try_other(copy):
            return
        self._books.host.lose(copy)
        self._admission.fail(copy, reason, final=not (loading and copy.known))

    def _gone(self, copy: Copy) -> None:
        if not copy.leaving:
            self._books.host.lose(copy)
            self._admission.fail(copy, f"adapter {copy.id} is gone from the runner")
        if copy.id in self._books.directory.copies:
            self._admission.unloading.forget(copy)
