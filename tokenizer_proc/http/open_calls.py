"""The generating calls that are open, by the ids that their clients know."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping

from tokenizer_proc.http.batch import Batch


class OpenCalls:
    """The open calls, in which /abort_request looks ids up. An id refers to some items (submits) of a call's batch.

    The ids of different owners do not meet: the same id may be open for several of them.
    """

    def __init__(self) -> None:
        self._running: dict[str, dict[str, list[tuple[Batch, Collection[int]]]]] = {}  # by owner, then by id

    @contextlib.contextmanager
    def listed(self, owner: str, ids: Mapping[str, Collection[int]], batch: Batch) -> Iterator[None]:
        """While entered, the items of `batch` can be aborted by the ids in `ids`, which map to item numbers."""
        own = self._running.setdefault(owner, {})
        for name, items in ids.items():
            own.setdefault(name, []).append((batch, items))
        try:
            yield
        finally:
            for name, items in ids.items():
                own[name].remove((batch, items))
                if not own[name]:
                    del own[name]
            if not own and self._running.get(owner) is own:
                del self._running[owner]

    def names(self) -> dict[int, list[str]]:
        """Returns the ids that clients know each open request by, keyed by the scheduler's request id."""
        found: dict[int, list[str]] = {}
        for name, calls in (each for own in self._running.values() for each in own.items()):
            for request_id in (each for batch, items in calls for each in batch.request_ids(items)):
                found.setdefault(request_id, []).append(name)
        return found

    def abort(self, owner: str | None, names: Iterable[str] | None) -> int:
        """Cancels the owner's items that the ids in `names` refer to; None: those of every owner, or all ids.

        Returns the number of calls with a cancelled item. Ids of other owners are ignored like ids that do not run.
        """
        owned = [*self._running.values()] if owner is None else [self._running.get(owner, {})]
        wanted = None if names is None else [*names]
        found = [own.get(name, []) for own in owned for name in (own if wanted is None else wanted)]
        for batch, items in [each for group in found for each in group]:
            batch.cancel(items)
        return len({id(batch) for group in found for batch, _ in group})
