"""Names and the copies they stand for. Two names of one revision share one copy. Knows nothing of tiers or pages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from engine.messages import AdapterState, LoadAdapter
from scheduler.adapters.copies import Adapter, Copy
from scheduler.types import LaneKey, lane_key


class AdapterRegistry:
    """Adapters by id, copies by id, by revision and by the id that the runner knows them under.

    `freeing` are ids under which the runner held a second copy of a revision: their `gone` is nobody's news.
    """

    def __init__(self) -> None:
        self.adapters: dict[int, Adapter] = {}
        self.copies: dict[int, Copy] = {}
        self.pinned: dict[int, Copy] = {}
        self.freed_ids: set[int] = set()
        self._by_revision: dict[str, Copy] = {}
        self._by_runner_id: dict[int, Copy] = {}

    def add(self, message: LoadAdapter) -> Adapter | None:
        """A new name, with a copy of its own until more is known. None if a copy still has this id of a name that went.

        Ids are never reused, so that is the asker's fault.
        """
        if message.adapter_id in self._by_runner_id or message.adapter_id in self.copies:
            return None
        card = AdapterState(adapter_id=message.adapter_id, state="loading", revision=message.revision)
        copy = Copy(message.adapter_id, message.adapter_id, card)
        adapter = Adapter(message.adapter_id, message, copy)
        copy.names[adapter.id] = adapter
        self.adapters[adapter.id] = adapter
        self.copies[copy.id] = self._by_runner_id[copy.runner_id] = copy
        return adapter

    def by_runner_id(self, runner_id: int) -> Copy | None:
        """The copy that the runner knows under this id."""
        return self._by_runner_id.get(runner_id)

    def key(self, lora: Iterable[tuple[int, float]]) -> LaneKey:
        """The lane of a selection of known adapters: their copies, with the sums of their scales."""
        return lane_key((self.adapters[adapter_id].copy.id, scale) for adapter_id, scale in lora if adapter_id)

    def of(self, key: LaneKey) -> list[Copy]:
        """The copies of a key."""
        return [self.copies[copy_id] for copy_id, _ in key]

    def pin(self, adapter: Adapter, pinned: bool) -> None:
        """A copy is pinned while one of its names is."""
        adapter.pinned = pinned
        self._repin(adapter.copy)

    def known(self, copy: Copy) -> Copy:
        """The copy that has this one's revision already, else itself, which has it from now on."""
        revision = copy.info.revision
        return self._by_revision.setdefault(revision, copy) if revision else copy

    def unlist_revision(self, copy: Copy) -> bool:
        """Nobody else is to share it: it goes, or cannot be served. True if it was its revision's until now."""
        if self._by_revision.get(copy.info.revision) is not copy:
            return False
        del self._by_revision[copy.info.revision]
        return True

    def merge(self, copy: Copy, into: Copy) -> list[Adapter]:
        """All names of `copy` stand for `into` from now on, and `copy` is no more. Returns those names."""
        moved = list(copy.names.values())
        for adapter in moved:
            adapter.copy = into
            into.names[adapter.id] = adapter
        del self.copies[copy.id]
        if self._by_runner_id.get(copy.runner_id) is copy:
            del self._by_runner_id[copy.runner_id]
        self.pinned.pop(copy.id, None)
        self._repin(into)
        return moved

    def set_runner_id(self, copy: Copy, runner_id: int) -> None:
        """The runner knows the copy under another id from now on."""
        del self._by_runner_id[copy.runner_id]
        copy.runner_id = runner_id
        self._by_runner_id[runner_id] = copy

    def detach(self, adapter: Adapter) -> None:
        """The name is no more; its copy stays for the others that it has."""
        del self.adapters[adapter.id]
        del adapter.copy.names[adapter.id]
        self._repin(adapter.copy)

    def drop(self, copy: Copy) -> None:
        """The copy is no more; it has no name left."""
        assert not copy.names
        self.unlist_revision(copy)
        del self.copies[copy.id]
        del self._by_runner_id[copy.runner_id]

    def audit(self, requests: Mapping[int, int], keys: Mapping[int, int]) -> None:
        """Proves that names and copies name one another, and the requests counted by name and by copy."""
        names = Counter({adapter.id: adapter.requests for adapter in self.adapters.values() if adapter.requests})
        assert names == Counter(requests), f"names count {dict(names)} requests, and there are {dict(requests)}"
        counts = Counter({copy.id: copy.requests for copy in self.copies.values() if copy.requests})
        assert counts == Counter(keys), f"copies count {dict(counts)} requests, and there are {dict(keys)}"
        for adapter in self.adapters.values():
            assert self.copies[adapter.copy.id] is adapter.copy, f"adapter {adapter.id} has a copy that is gone"
            assert adapter.copy.names[adapter.id] is adapter
        for copy in self.copies.values():
            assert copy.names or copy.is_unloading, f"copy {copy.id} has no name"
            assert copy.pinned == any(adapter.pinned for adapter in copy.names.values())
            assert self._by_runner_id[copy.runner_id] is copy
        assert len(self._by_runner_id) == len(self.copies)
        for revision, copy in self._by_revision.items():
            assert self.copies[copy.id] is copy
            assert copy.info.revision == revision
        assert set(self.pinned) == {copy.id for copy in self.copies.values() if copy.pinned}, "the pinned are others"

    def _repin(self, copy: Copy) -> None:
        copy.pinned = any(adapter.pinned for adapter in copy.names.values())
        if copy.pinned:
            self.pinned[copy.id] = copy
        else:
            self.pinned.pop(copy.id, None)
