"""The registry of adapters (called names here) and the copies they refer to. Names of one revision share one copy.

Only this module writes the fields of adapters, and the fields of copies other than `host` and `device`. It does not
depend on the caches.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping

from msgspec.structs import replace

from engine.messages import AdapterState, LoadAdapter
from scheduler.adapters.copies import Adapter, AdapterCopy
from scheduler.types import LaneKey, Order, lane_key


class AdapterRegistry:
    """Adapters by id; copies by id, by revision, and by the id under which the runner knows them."""

    def __init__(self, tick: Callable[[], int]) -> None:
        self.adapters: dict[int, Adapter] = {}
        self.copies: dict[int, AdapterCopy] = {}
        self.pinned: dict[int, AdapterCopy] = {}
        self.freed_ids: set[int] = set()  # runner ids that are being freed and belong to no copy: "gone" is ignored
        self._by_revision: dict[str, AdapterCopy] = {}  # the copy that other names of the revision share
        self._by_runner_id: dict[int, AdapterCopy] = {}
        self._tick = tick

    # ------------------------------------------------------------------------------------------------------ lookups

    def by_runner_id(self, runner_id: int) -> AdapterCopy | None:
        """Returns the copy whose id at the runner is `runner_id`, or None."""
        return self._by_runner_id.get(runner_id)

    def key(self, lora: Iterable[tuple[int, float]]) -> LaneKey:
        """Returns the lane key of (adapter id, scale) pairs: each adapter's copy with the sum of its scales.

        The adapters must exist. Id 0 (the base model) is left out.
        """
        return lane_key((self.adapters[adapter_id].copy.id, scale) for adapter_id, scale in lora if adapter_id)

    def of(self, key: LaneKey) -> list[AdapterCopy]:
        """Returns the copies of a lane key."""
        return [self.copies[copy_id] for copy_id, _ in key]

    # ------------------------------------------------------------------------------------------------------ one name

    def add(self, message: LoadAdapter) -> Adapter | None:
        """Adds an adapter with its own copy, and returns it. The copy may be merged once its revision is known.

        Returns None if a copy still has this id because of an adapter that is gone: the client must not reuse ids.
        """
        if message.adapter_id in self._by_runner_id or message.adapter_id in self.copies:
            return None
        info = AdapterState(adapter_id=message.adapter_id, state="loading", revision=message.revision)
        copy = AdapterCopy(message.adapter_id, message.adapter_id, info)
        adapter = Adapter(message.adapter_id, message, copy)
        copy.names[adapter.id] = adapter
        self.adapters[adapter.id] = adapter
        self.copies[copy.id] = self._by_runner_id[copy.runner_id] = copy
        return adapter

    def set_source(self, adapter: Adapter, message: LoadAdapter) -> None:
        """Sets the files that an adapter is loaded from; its copy must be on disk.

        Also takes the revision from `message`, unless a load has already reported one.
        """
        adapter.source = message
        copy = adapter.copy
        if not copy.loaded_once:
            copy.info = replace(copy.info, revision=message.revision)

    def pin(self, adapter: Adapter, pinned: bool) -> None:
        """Pins or unpins an adapter. A copy is pinned while at least one of its adapters is pinned."""
        adapter.pinned = pinned
        self._update_pinned(adapter.copy)

    def start_draining(self, adapter: Adapter) -> None:
        """Marks the adapter as draining: it accepts no new requests."""
        adapter.draining = True

    def remove_name(self, adapter: Adapter) -> None:
        """Removes the adapter. Its copy stays, and keeps its other adapters."""
        del self.adapters[adapter.id]
        del adapter.copy.names[adapter.id]
        self._update_pinned(adapter.copy)

    # ------------------------------------------------------------------------------------------------------ one copy

    def set_info(self, copy: AdapterCopy, info: AdapterState) -> None:
        """Sets what a successful load of the copy reported, and marks the copy as loaded once."""
        copy.info, copy.loaded_once = info, True

    def set_error(self, copy: AdapterCopy, error: str) -> None:
        """Marks the copy as failed: it cannot be served."""
        copy.error = error

    def set_server_fault(self, copy: AdapterCopy, server_fault: bool) -> None:
        """Sets whether what the copy's last load or fill failed for lies in this server."""
        copy.info = replace(copy.info, server_fault=server_fault)

    def mark_unloading(self, copy: AdapterCopy) -> None:
        """Marks the copy as being unloaded by the runner, and drops its preload. None of its names accepts requests."""
        copy.is_unloading = True
        copy.references.preload_order = None

    def set_preload(self, copy: AdapterCopy, order: Order | None) -> None:
        """Sets the order of the copy's preload among the requests; None ends the preload."""
        copy.references.preload_order = order

    def share_revision(self, copy: AdapterCopy) -> AdapterCopy:
        """Returns the copy that is listed for the revision of `copy`; lists `copy` itself if there is none.

        Adapters of the same revision that are loaded later share the listed copy.
        """
        revision = copy.info.revision
        return self._by_revision.setdefault(revision, copy) if revision else copy

    def unlist_revision(self, copy: AdapterCopy) -> bool:
        """Unlists the copy, so that no more names share it. Returns whether it was listed by its revision."""
        if self._by_revision.get(copy.info.revision) is not copy:
            return False
        del self._by_revision[copy.info.revision]
        return True

    def merge(self, copy: AdapterCopy, into: AdapterCopy) -> list[Adapter]:
        """Moves all names of `copy` to `into`, and removes `copy`. Returns the moved names."""
        moved = list(copy.names.values())
        for adapter in moved:
            adapter.copy = into
            into.names[adapter.id] = adapter
        del self.copies[copy.id]
        if self._by_runner_id.get(copy.runner_id) is copy:
            del self._by_runner_id[copy.runner_id]
        self.pinned.pop(copy.id, None)
        self._update_pinned(into)
        return moved

    def set_runner_id(self, copy: AdapterCopy, runner_id: int) -> None:
        """Changes the id of the copy in messages to and from the runner."""
        del self._by_runner_id[copy.runner_id]
        copy.runner_id = runner_id
        self._by_runner_id[runner_id] = copy

    def remove(self, copy: AdapterCopy) -> None:
        """Removes a copy that has no names left."""
        assert not copy.names
        self.unlist_revision(copy)
        del self.copies[copy.id]
        del self._by_runner_id[copy.runner_id]

    # --------------------------------------------------------------------------------------------------- references

    def acquire_names(self, adapter_ids: Iterable[int]) -> None:
        """Counts one more request that names these adapters."""
        for adapter_id in adapter_ids:
            self.adapters[adapter_id].requests += 1

    def release_names(self, adapter_ids: Iterable[int]) -> list[Adapter]:
        """Counts one request less that names these adapters. Returns the adapters."""
        adapters = [self.adapters[adapter_id] for adapter_id in adapter_ids]
        for adapter in adapters:
            adapter.requests -= 1
        return adapters

    def acquire(self, key: LaneKey) -> list[AdapterCopy]:
        """Counts one more request that needs the copies of its lane key. Returns the copies."""
        copies = self.of(key)
        for copy in copies:
            copy.references.requests += 1
        return copies

    def release(self, key: LaneKey, ended: bool) -> list[AdapterCopy]:
        """Counts one request less that needs the copies of its lane key. Returns the copies.

        `ended`: the request has ended, so this tick is the copies' last use; otherwise only its key changes.
        """
        copies = self.of(key)
        for copy in copies:
            copy.references.requests -= 1
            if ended:
                copy.references.last_used = self._tick()
        return copies

    def audit(self, requests: Mapping[int, int], keys: Mapping[int, int]) -> None:
        """Asserts that names and copies refer to one another, and that their request counts are right.

        `requests`: how many requests name each adapter id; `keys`: how many requests need each copy id.
        """
        names = Counter({adapter.id: adapter.requests for adapter in self.adapters.values() if adapter.requests})
        assert names == Counter(requests), f"names count {dict(names)} requests, and there are {dict(requests)}"
        counted = {copy.id: copy.references.requests for copy in self.copies.values() if copy.references.requests}
        assert counted == dict(keys), f"copies count {counted} requests, and there are {dict(keys)}"
        for adapter in self.adapters.values():
            assert self.copies[adapter.copy.id] is adapter.copy, f"adapter {adapter.id} has a copy that is gone"
            assert adapter.copy.names[adapter.id] is adapter, f"copy {adapter.copy.id} lacks name {adapter.id}"
        for copy in self.copies.values():
            assert copy.names or copy.is_unloading, f"copy {copy.id} has no name"
            assert copy.pinned == any(adapter.pinned for adapter in copy.names.values()), f"copy {copy.id} is pinned"
            assert self._by_runner_id[copy.runner_id] is copy, f"copy {copy.id} is not listed by its runner id"
        assert len(self._by_runner_id) == len(self.copies), "a runner id is listed without a copy"
        for revision, copy in self._by_revision.items():
            assert self.copies[copy.id] is copy, f"revision {revision} is listed by a copy that is gone"
            assert copy.info.revision == revision, f"copy {copy.id} is listed by another revision"
        pinned = {copy.id for copy in self.copies.values() if copy.pinned}
        assert set(self.pinned) == pinned, f"pinned are {sorted(pinned)}, and listed {sorted(self.pinned)}"

    def _update_pinned(self, copy: AdapterCopy) -> None:
        copy.pinned = any(adapter.pinned for adapter in copy.names.values())
        if copy.pinned:
            self.pinned[copy.id] = copy
        else:
            self.pinned.pop(copy.id, None)
