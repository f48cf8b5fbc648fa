"""The generating calls that are open, by the ids that their clients know."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping

from tokenizer_proc.http.batch import Batch


class OpenCalls:
    """The open calls, in which /abort_request looks ids up. An id refers to some items (submits) of a call's batch."""

    def __init__(self) -> None:
        self._running: dict[str, list[tuple[Batch, Collection[int]]]] = {}

    @contextlib.contextmanager
    def listed(self, ids: Mapping[str, Collection[int]], batch: Batch) -> Iterator[None]:
        """While entered, the items of `batch` can be aborted by the ids in `ids`, which map to item numbers."""
        for name, items in ids.items():
            self._running.setdefault(name, []).append((batch, items))
        try:
            yield
        finally:
            for name, items in ids.items():
                self._running[name].remove((batch, items))
                if not self._running[name]:
                    del self._running[name]

    def names(self) -> dict[int, list[str]]:
        """Returns the ids that clients know each open request by, keyed by the scheduler's request id."""
        found: dict[int, list[str]] = {}
        for name, calls in self._running.items():
            for request_id in (each for batch, items in calls for each in batch.request_ids(items)):
                found.setdefault(request_id, []).append(name)
        return found

    def abort(self, names: Iterable[str] | None) -> int:
        """Cancels the items that the ids in `names` refer to, or all items if `names` is None.

        Returns the number of calls with a cancelled item.
        """
        found = [self._running.get(name, []) for name in (self._running if names is None else names)]
        for batch, items in (each for group in found for each in group):
            batch.cancel(items)
        return len({id(batch) for group in found for batch, _ in group})
