"""How names and copies leave: a draining name after its last request, a copy with its last name. Knows no queue."""

from __future__ import annotations

from msgspec.structs import replace

from engine.messages import UnloadAdapter
from scheduler.adapters.copies import Adapter, Copy, Host
from scheduler.state import Books


class Unloading:
    """The way out for adapters, over the books."""

    def __init__(self, books: Books) -> None:
        self._books = books

    def unload_if_drained(self, adapter: Adapter) -> None:
        """Lets a draining name go after its last request, and with the last name its copy, if nobody reads it."""
        books, copy = self._books, adapter.copy
        if not adapter.draining or adapter.requests or copy.leaving:
            return
        if len(copy.names) > 1:
            self._let_go(adapter)
            books.rest(copy)
            return
        if copy.host is Host.LOADING or copy.fills:
            return
        there = copy.on_host or copy.on_device
        books.residency.free(copy)
        books.disown(copy)
        copy.leaving, copy.wish = True, None
        books.rest(copy)
        if copy.sent:
            books.news.append(UnloadAdapter(copy.holder))
        if not there:
            if copy.sent:
                books.directory.freeing.add(copy.holder)  # its answer is nobody's, not that of whoever has the id next
            self.forget(copy)  # nothing to wait for

    def unload_drained(self, copy: Copy) -> None:
        """The same for each of its names."""
        for adapter in list(copy.names.values()):
            self.unload_if_drained(adapter)

    def forget(self, copy: Copy) -> None:
        """The copy is gone with all its names, and that is told."""
        books = self._books
        books.residency.free(copy)
        books.host.lose(copy)
        for adapter in list(copy.names.values()):
            self._let_go(adapter)
        books.directory.drop(copy)
        books.stirred = True

    def _let_go(self, adapter: Adapter) -> None:
        self._books.directory.detach(adapter)
        self._books.news.append(
            replace(adapter.copy.card, adapter_id=adapter.id, state="gone", error=None, seconds=0.0)
        )
