"""The host tier: which copies it holds, and what its bounds allow. Knows nothing of who waits for what, or of pages.

    count, bytes    LOADING + HELD + EVICTING                bounds    --max-loaded-loras, --lora-host-memory
    spare           HELD, nobody wants it, not pinned, no fill reads it: the first to go, in the order of the policy

The size of a first load is not known before it has answered, so the bytes may be above the bound for a moment: until
the spare ones have gone. What nobody may evict (pinned, read by a fill) may stay above it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from scheduler.adapters.copies import Copy, Host
from scheduler.adapters.eviction import EvictionOrder, Policy


class HostCache:
    """Copies by id while they take room. `max_count` None and `max_bytes` 0 are no bounds."""

    def __init__(self, max_count: int | None, max_bytes: int, policy: Policy, tick: Callable[[], int]) -> None:
        self.max_count = max_count
        self.max_bytes = max_bytes
        self.held: dict[int, Copy] = {}
        self.spare = EvictionOrder()
        self.bytes = self.loading = self.evicting = self._leaving_bytes = 0
        self._policy = policy
        self._tick = tick

    def reset(self, max_bytes: int) -> None:
        """A new runner: nothing is held."""
        self.max_bytes = max_bytes
        self.held.clear()
        self.spare.clear()
        self.bytes = self.loading = self.evicting = self._leaving_bytes = 0

    # ---------------------------------------------------------------------------------------------------- one copy

    def start(self, copy: Copy) -> None:
        """Its load begins."""
        assert copy.host is Host.DISK
        copy.host = Host.LOADING
        self.held[copy.id] = copy
        self.loading += 1
        self.bytes += copy.info.bytes

    def hold(self, copy: Copy, size: int) -> None:
        """Its load was answered; it is `size` bytes."""
        assert copy.host is Host.LOADING
        copy.host = Host.HELD
        self.loading -= 1
        self.bytes += size - copy.info.bytes
        copy.held_since = copy.last_used = self._tick()

    def evict(self, copy: Copy) -> None:
        """The runner is told to forget it."""
        assert copy.host is Host.HELD
        assert not copy.fills
        copy.host = Host.EVICTING
        self.evicting += 1
        self._leaving_bytes += copy.info.bytes
        self.reclassify(copy)

    def lose(self, copy: Copy) -> None:
        """It takes no room any more."""
        if not copy.on_host:
            return
        if copy.host is Host.LOADING:
            self.loading -= 1
        if copy.host is Host.EVICTING:
            self.evicting -= 1
            self._leaving_bytes -= copy.info.bytes
        self.bytes -= copy.info.bytes
        copy.host = Host.DISK
        del self.held[copy.id]
        self.reclassify(copy)

    def adopt(self, copy: Copy, other: Copy) -> None:
        """`copy`, which is on disk, is the one that `other` (of equal bytes) was held as."""
        self.lose(other)
        copy.host = Host.HELD
        self.held[copy.id] = copy
        self.bytes += copy.info.bytes
        copy.held_since = copy.last_used = self._tick()

    def reclassify(self, copy: Copy) -> None:
        """Something about it changed: is it spare?"""
        if self.evictable(copy) and not copy.requests and copy.preload_order is None:
            self.spare.put(copy.id, copy.last_used if self._policy == "lru" else copy.held_since)
        else:
            self.spare.drop(copy.id)

    @staticmethod
    def evictable(copy: Copy) -> bool:
        """Whether the runner may be told to forget it."""
        return copy.host is Host.HELD and not copy.fills and not copy.pinned and not copy.is_unloading

    # ------------------------------------------------------------------------------------------------------ bounds

    def has_room(self, copy: Copy) -> bool:
        """Whether its load may begin now."""
        if self.max_count is not None and len(self.held) >= self.max_count:
            return False
        return not self.max_bytes or self.bytes + copy.info.bytes <= self.max_bytes

    def lacking(self, copy: Copy | None = None) -> tuple[int, int]:
        """(places, bytes) that must still be evicted before its load may begin, or to be within the bounds."""
        count, size = (1, copy.info.bytes) if copy is not None else (0, 0)
        places = 0 if self.max_count is None else len(self.held) - self.evicting + count - self.max_count
        missing = self.bytes - self._leaving_bytes + size - self.max_bytes if self.max_bytes else 0
        return max(0, places), max(0, missing)

    def limit_error(self, copies: Sequence[Copy]) -> str | None:
        """Why these could never be held together."""
        if self.max_count is not None and len(copies) > self.max_count:
            limit = f"the host tier holds {self.max_count}; raise --max-loaded-loras"
            return f"the mix has {len(copies)} adapters, but {limit}"
        size = sum(copy.info.bytes for copy in copies)
        if self.max_bytes and size > self.max_bytes:
            what = "the adapter takes" if len(copies) == 1 else "the adapters of the mix take"
            limit = f"the host tier has {self.max_bytes}; raise --lora-host-memory"
            return f"{what} {size} bytes of host memory, but {limit}"
        return None

    def never_fits(self, copies: Sequence[Copy], pinned: Iterable[Copy]) -> str | None:
        """Why these could not even be held if everything unpinned went."""
        wanted = {copy.id for copy in copies}
        all_of_them = [*copies, *(copy for copy in pinned if copy.on_host and copy.id not in wanted)]
        if self.limit_error(all_of_them) is None:
            return None
        return (
            "the adapter does not fit in the host tier beside the pinned ones; unpin one, or raise --max-loaded-loras "
            "or --lora-host-memory"
        )

    def audit(self, copies: Iterable[Copy]) -> None:
        """Proves the sums, the spare ones, and the bound on the count."""
        held = {copy.id: copy for copy in copies if copy.on_host}
        assert held == self.held, f"the host tier holds {sorted(held)}, and lists {sorted(self.held)}"
        assert self.bytes == sum(copy.info.bytes for copy in held.values()), f"{self.bytes} host bytes"
        evicting = [copy for copy in held.values() if copy.host is Host.EVICTING]
        assert self.evicting == len(evicting)
        assert self._leaving_bytes == sum(copy.info.bytes for copy in evicting)
        assert self.loading == sum(copy.host is Host.LOADING for copy in held.values())
        spare = {c.id for c in held.values() if self.evictable(c) and not c.requests and c.preload_order is None}
        assert spare == set(self.spare), f"spare are {sorted(spare)}, and listed {sorted(self.spare)}"
        assert self.max_count is None or len(held) <= self.max_count, f"{len(held)} copies are above --max-loaded-loras"
        if self.max_bytes and self.bytes - self._leaving_bytes > self.max_bytes:
            assert not spare, f"{self.bytes} host bytes are above --lora-host-memory, though {sorted(spare)} are spare"
