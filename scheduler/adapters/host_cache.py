"""The host cache: which copies are in host memory, and its limits. Knows no requests, lanes or rank pages.

    count, bytes    LOADING + HELD + EVICTING                limits    --max-loaded-loras, --lora-host-memory
    spare           HELD, not wanted, not pinned, no fill reads it: evicted first, in the order of the policy

The size of a copy is not known before its first load has ended, so the bytes may exceed the limit until spare copies
have been evicted, and longer if the copies may not be evicted (because they are pinned or a fill reads them).

Only this module writes `AdapterCopy.host`. A method that changes copies returns them, and its caller calls
`reclassify` for each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from scheduler.adapters.copies import AdapterCopy, HostCopy, HostState
from scheduler.adapters.stamp_order import Policy, StampOrder


class HostCache:
    """The copies that take room in host memory, by id. `max_count` None and `max_bytes` 0 mean no limit."""

    def __init__(self, max_count: int | None, max_bytes: int, policy: Policy, tick: Callable[[], int]) -> None:
        self.max_count = max_count
        self.max_bytes = max_bytes
        self.held: dict[int, AdapterCopy] = {}  # in state LOADING, HELD or EVICTING
        self.spare: StampOrder[int] = StampOrder()
        self.bytes = 0  # the sum of the sizes of all held copies
        self.loading = 0  # how many copies are in state LOADING
        self.evicting = 0  # how many copies are in state EVICTING
        self._evicting_bytes = 0
        self._policy = policy
        self._tick = tick

    def reset(self, max_bytes: int, copies: Iterable[AdapterCopy]) -> None:
        """Empties the cache for a new runner. `copies`: all copies that exist."""
        self.max_bytes = max_bytes
        self.held.clear()
        self.spare.clear()
        self.bytes = self.loading = self.evicting = self._evicting_bytes = 0
        for copy in copies:
            copy.host = HostCopy(held_since=copy.host.held_since)

    # ---------------------------------------------------------------------------------------------------- one copy

    def start_load(self, copy: AdapterCopy) -> None:
        """Moves the copy from DISK to LOADING. The caller then calls `add_tried_path`."""
        assert copy.host.state is HostState.DISK
        copy.host.state = HostState.LOADING
        copy.host.known_to_runner = True
        copy.host.tried_paths.clear()
        self.held[copy.id] = copy
        self.loading += 1
        self.bytes += copy.info.bytes

    def add_tried_path(self, copy: AdapterCopy, path: str) -> None:
        """Records that the load of a copy was sent to the runner with this path."""
        assert copy.host.state is HostState.LOADING
        copy.host.tried_paths.append(path)

    def finish_load(self, copy: AdapterCopy, size: int) -> None:
        """Moves the copy from LOADING to HELD, with `size` bytes. The caller updates `copy.info` after this call."""
        assert copy.host.state is HostState.LOADING
        copy.host.state = HostState.HELD
        self.loading -= 1
        self.bytes += size - copy.info.bytes
        copy.host.held_since = self._tick()

    def evict(self, copies: Sequence[AdapterCopy]) -> Sequence[AdapterCopy]:
        """Moves these copies from HELD to EVICTING and returns them. The caller sends EvictAdapter for each."""
        for copy in copies:
            assert copy.host.state is HostState.HELD
            assert not copy.device.fills_in_flight
            copy.host.state = HostState.EVICTING
            self.evicting += 1
            self._evicting_bytes += copy.info.bytes
        return copies

    def remove(self, copy: AdapterCopy) -> list[AdapterCopy]:
        """Moves the copy to DISK: it takes no more room. Returns [copy] if it took room before, otherwise []."""
        if not copy.on_host:
            return []
        if copy.host.state is HostState.LOADING:
            self.loading -= 1
        if copy.host.state is HostState.EVICTING:
            self.evicting -= 1
            self._evicting_bytes -= copy.info.bytes
        self.bytes -= copy.info.bytes
        copy.host.state = HostState.DISK
        del self.held[copy.id]
        return [copy]

    def adopt(self, copy: AdapterCopy, other: AdapterCopy) -> list[AdapterCopy]:
        """Hands the host memory of `other` over to `copy`, which is in state DISK. Returns both copies."""
        self.remove(other)
        copy.host.state = HostState.HELD
        copy.host.known_to_runner = True
        self.held[copy.id] = copy
        self.bytes += copy.info.bytes
        copy.host.held_since = self._tick()
        return [copy, other]

    def reclassify(self, copy: AdapterCopy) -> None:
        """Updates whether the copy is listed as spare, after it has changed."""
        if self.is_evictable(copy) and not copy.is_wanted:
            self.spare.put(copy.id, copy.last_used if self._policy == "lru" else copy.host.held_since)
        else:
            self.spare.drop(copy.id)

    @staticmethod
    def is_evictable(copy: AdapterCopy) -> bool:
        """Returns whether the copy may be evicted from the host."""
        held = copy.host.state is HostState.HELD and not copy.device.fills_in_flight
        return held and not copy.pinned and not copy.is_unloading

    # ------------------------------------------------------------------------------------------------------ limits

    def has_room(self, copy: AdapterCopy) -> bool:
        """Returns whether the load of the copy fits within the limits now."""
        if self.max_count is not None and len(self.held) >= self.max_count:
            return False
        return not self.max_bytes or self.bytes + copy.info.bytes <= self.max_bytes

    def lacking(self, copy: AdapterCopy | None = None) -> tuple[int, int]:
        """Returns (copies, bytes) that must still be evicted before the load of `copy` fits within the limits.

        Without `copy`: that must still be evicted before the cache is within its limits.
        """
        count, size = (1, copy.info.bytes) if copy is not None else (0, 0)
        places = 0 if self.max_count is None else len(self.held) - self.evicting + count - self.max_count
        missing = self.bytes - self._evicting_bytes + size - self.max_bytes if self.max_bytes else 0
        return max(0, places), max(0, missing)

    def limit_error(self, copies: Sequence[AdapterCopy]) -> str | None:
        """Returns why these copies can never be held together, or None if they can."""
        if self.max_count is not None and len(copies) > self.max_count:
            limit = f"the host tier holds {self.max_count}; raise --max-loaded-loras"
            return f"the mix has {len(copies)} adapters, but {limit}"
        size = sum(copy.info.bytes for copy in copies)
        if self.max_bytes and size > self.max_bytes:
            what = "the adapter takes" if len(copies) == 1 else "the adapters of the mix take"
            limit = f"the host tier has {self.max_bytes}; raise --lora-host-memory"
            return f"{what} {size} bytes of host memory, but {limit}"
        return None

    def never_fits(self, copies: Sequence[AdapterCopy], pinned: Iterable[AdapterCopy]) -> str | None:
        """Returns why these copies do not fit even if every copy that is not pinned is evicted, or None if they do."""
        wanted = {copy.id for copy in copies}
        with_pinned = [*copies, *(copy for copy in pinned if copy.on_host and copy.id not in wanted)]
        if self.limit_error(with_pinned) is None:
            return None
        return (
            "the adapter does not fit in the host tier beside the pinned ones; unpin one, or raise --max-loaded-loras "
            "or --lora-host-memory"
        )

    def audit(self, copies: Iterable[AdapterCopy]) -> None:
        """Asserts the sums, the list of spare copies, and the limits."""
        held = {copy.id: copy for copy in copies if copy.on_host}
        assert held == self.held, f"the host tier holds {sorted(held)}, and lists {sorted(self.held)}"
        assert self.bytes == sum(copy.info.bytes for copy in held.values()), f"{self.bytes} host bytes"
        evicting = [copy for copy in held.values() if copy.host.state is HostState.EVICTING]
        assert self.evicting == len(evicting), f"{self.evicting} copies are being evicted"
        size = sum(copy.info.bytes for copy in evicting)
        assert self._evicting_bytes == size, f"{self._evicting_bytes} bytes are being evicted"
        loading = sum(copy.host.state is HostState.LOADING for copy in held.values())
        assert self.loading == loading, f"{self.loading} copies are being loaded"
        spare = {copy.id for copy in held.values() if self.is_evictable(copy) and not copy.is_wanted}
        assert spare == set(self.spare), f"spare are {sorted(spare)}, and listed {sorted(self.spare)}"
        assert self.max_count is None or len(held) <= self.max_count, f"{len(held)} copies are above --max-loaded-loras"
        if self.max_bytes and self.bytes - self._evicting_bytes > self.max_bytes:
            assert not spare, f"{self.bytes} host bytes are above --lora-host-memory, though {sorted(spare)} are spare"
