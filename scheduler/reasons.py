"""Why a waiting request waits: a pure reading of the books.

load       an adapter is to be read from disk, or is being read
fill       an adapter is being copied into rank pages, or will be in one of the next steps
rank_pages its adapter finds no rank pages: those who are before it or run use them
lanes      its adapter finds no lane, or its lane makes way for another
rows       the step has no row left
pages      KV pages are lacking; or somebody before it waits for the like
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from engine.messages import WaitReason
from scheduler.books import Books
from scheduler.request import LaneKey, Request
from scheduler.waiting import Place


def why(books: Books, request: Request) -> WaitReason | None:
    """Why this request waits; None if it does not."""
    if request.done or request.row >= 0 or request.key not in books.waiting:
        return None
    return _of_key(books, request.key, books.residency.room())


def counts(books: Books) -> dict[WaitReason, int]:
    """How many requests wait, by reason."""
    found: Counter[WaitReason] = Counter()
    room = books.residency.room()
    for key in books.waiting.all_keys():
        found[_of_key(books, key, room)] += books.waiting.count(key)
    return dict(found)


def _of_key(books: Books, key: LaneKey, room: Mapping[str, int]) -> WaitReason:
    place = books.waiting.place_of(key)
    if place is Place.DISK:
        return "load"
    if place is Place.BLOCKED:
        return "fill" if all(copy.on_device or copy.can_fill for copy in books.copies(key)) else "load"
    if place is Place.DRAINING or (place is not Place.ACTIVE and not books.lanes.free):
        return "lanes"
    if place is Place.COLD:
        return "rank_pages" if books.residency.lacking_in(books.copies(key), room) else "fill"
    return "pages" if books.running.free else "rows"
