"""Which adapters are read from disk now, and which host copies go for them. Knows nothing of rank pages or steps.

Loads begin in the order of those who wait for them, at most MAX_LOADS at a time; errands (loads that a client asked
for, and copies that are to be here though nobody waits) take turns with them and have a place in the same order.

To make room, in this order:    spare copies, by the policy
                                host copies of resident ones (their rank pages stay)
                                copies that only later ones wait for, the latest first

So a copy that somebody waits for never goes for someone behind him, and the first in order always gets on.
"""

from __future__ import annotations

from collections.abc import Iterator

from msgspec.structs import replace

from engine.messages import EvictAdapter
from scheduler.adapters.copies import Adapter, Copy, Device, Host
from scheduler.admission import Admission
from scheduler.requests.queue import WaitState
from scheduler.state import Books
from scheduler.types import BASE, LaneKey, Order

MAX_LOADS = 4
NOBODY: Order = (-(1 << 62), 0)  # before everyone: whoever waits may be made to wait longer


class Loading:
    """Loads and host evictions, over the books."""

    def __init__(self, books: Books, admission: Admission) -> None:
        self._books = books
        self._admission = admission
        self._errands: dict[int, Order] = {}
        self._former: dict[int, None] = {}  # were here before the runner died: read again while there is room
        self._errand_next = False

    def ask(self, copy: Copy) -> None:
        """The copy is to be read though nobody waits for it."""
        self._errands.setdefault(copy.id, copy.wish or self._books.next_order())
        self._books.stirred = True

    def recall(self, copies: list[Copy]) -> None:
        """These were in the tiers of a runner that died."""
        self._former = {copy.id: None for copy in copies}

    def forget_all(self) -> None:
        """A new runner: whoever is to be read is asked for again."""
        self._errands.clear()
        self._former.clear()

    def fetch(self) -> None:
        """Evicts what is above the bounds and begins the loads that may begin; nothing to do unless books stirred."""
        books = self._books
        while books.stirred:
            books.stirred = False
            self._trim()
            while books.host.loading < MAX_LOADS and self._start_one():
                pass

    def try_other(self, copy: Copy) -> bool:
        """A load failed: tries the files of another of its names, if there is one; true if it does."""
        adapter = self._untried(copy)
        if adapter is not None:
            self._send(copy, adapter)
        return adapter is not None

    # ------------------------------------------------------------------------------------------------------- loads

    def _start_one(self) -> bool:
        """Begins the next load; false if there is none or it must wait."""
        wanted, errand = self._wanted(), self._errand()
        if wanted is None and errand is None:
            return self._start_former()
        if wanted is None or errand is None:
            return self._try(wanted, errand)
        first_errand = self._errand_next
        if self._try(None if first_errand else wanted, errand if first_errand else None):
            self._errand_next = not first_errand
            return True
        other_goes_first = (wanted[2] < errand[1]) if first_errand else (errand[1] < wanted[2])
        return other_goes_first and self._try(wanted if first_errand else None, None if first_errand else errand)

    def _try(self, wanted: tuple[Copy, LaneKey, Order] | None, errand: tuple[Copy, Order] | None) -> bool:
        """Begins this load if there is room, or ends the wait for what can never be."""
        if wanted is not None:
            copy, key, order = wanted
        else:
            assert errand is not None
            (copy, order), key = errand, BASE
        if self._make_room(copy, order):
            self._start(copy)
            if wanted is not None and key in self._books.waiting:
                self._books.ordering.on_transfer(self._books.waiting.head(key), copy.card.bytes)
            return True
        books = self._books
        copies = books.copies(key) or [copy]
        problem = books.host.hopeless(copies, books.directory.pinned.values())
        if problem is None:
            return False
        if key != BASE:
            self._admission.fail_waiting(key, problem)
            return True
        self._errands.pop(copy.id, None)
        copy.wish = None
        if copy.known:
            books.tell(copy, error=problem)
        else:
            self._admission.fail(copy, problem)
        return True

    def _wanted(self) -> tuple[Copy, LaneKey, Order] | None:
        request = self._books.waiting.first(WaitState.DISK)
        if request is None:
            return None
        copy = next(copy for copy in self._books.copies(request.key) if copy.to_load)
        return copy, request.key, request.order

    def _errand(self) -> tuple[Copy, Order] | None:
        for copy_id, order in list(self._errands.items()):
            copy = self._books.directory.copies.get(copy_id)
            if copy is not None and copy.to_load and copy.error is None and not copy.leaving:
                return copy, order
            if copy is None or copy.host is not Host.EVICTING:
                del self._errands[copy_id]
        return None

    def _start_former(self) -> bool:
        while self._former:
            copy = self._books.directory.copies.get(next(iter(self._former)))
            if copy is not None and copy.to_load and copy.error is None and not copy.leaving:
                if not self._books.host.has_room(copy):
                    self._former.clear()
                    return False
                self._start(copy)
                return True
            del self._former[next(iter(self._former))]
        return False

    def _start(self, copy: Copy) -> None:
        self._errands.pop(copy.id, None)
        self._former.pop(copy.id, None)
        self._books.host.start(copy)
        copy.tried.clear()
        adapter = self._untried(copy)
        assert adapter is not None
        self._send(copy, adapter)
        if copy.known:
            self._books.tell(copy)
        self._admission.settle_copy(copy)

    def _send(self, copy: Copy, adapter: Adapter) -> None:
        copy.tried.append(adapter.source.path)
        copy.sent = True
        source, revision = adapter.source, copy.card.revision
        self._books.news.append(replace(source, adapter_id=copy.holder, revision=revision, pinned=copy.pinned))

    @staticmethod
    def _untried(copy: Copy) -> Adapter | None:
        return next((adapter for adapter in copy.names.values() if adapter.source.path not in copy.tried), None)

    # --------------------------------------------------------------------------------------------------- evictions

    def _make_room(self, copy: Copy, order: Order) -> bool:
        """Whether the load may begin; sends away what it needs gone, or nobody if that is not enough."""
        host = self._books.host
        places, size = host.lacking(copy)
        if places or size:
            victims: list[Copy] = []
            for victim in self._victims(order):
                victims.append(victim)
                places, size = places - 1, size - victim.card.bytes
                if places <= 0 and size <= 0:
                    break
            if places > 0 or size > 0:
                return False
            for victim in victims:
                self._evict(victim)
        return host.has_room(copy)

    def _trim(self) -> None:
        """Back within the bound on bytes, as far as it goes."""
        if self._books.host.lacking() == (0, 0):
            return
        for victim in list(self._victims(NOBODY)):
            if self._books.host.lacking() == (0, 0):
                return
            self._evict(victim)

    def _victims(self, order: Order) -> Iterator[Copy]:
        """Who may go for a load in this place of the order, in the order of going."""
        host = self._books.host
        yield from [host.held[copy_id] for copy_id in host.spare]
        busy = [c for c in host.held.values() if host.evictable(c) and c.id not in host.spare]
        yield from (copy for copy in busy if copy.device is Device.RESIDENT)
        waited = ((self._books.awaited(copy), copy.id) for copy in busy if copy.device is Device.NONE)
        for _, copy_id in sorted(((p, i) for p, i in waited if p is not None and p > order), reverse=True):
            yield host.held[copy_id]

    def _evict(self, copy: Copy) -> None:
        books = self._books
        books.host.evict(copy)
        books.counters.host_evictions += 1
        books.news.append(EvictAdapter(copy.holder))
        if copy.wish is not None:
            books.wishes.pop(copy.id, None)
            self._errands[copy.id] = copy.wish
        self._admission.settle_copy(copy)
