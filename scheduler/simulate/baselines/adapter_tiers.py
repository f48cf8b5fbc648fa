"""The adapters of a baseline scheduler on disk, host and device, with LRU eviction. Does not depend on requests.

An adapter with a lane stays on the device. An adapter that is loading or filling is not evicted.
"""

from __future__ import annotations

from collections.abc import Container, Iterable

from engine.messages import AdapterState, Capacity, EvictAdapter, Fill, LoadAdapter
from scheduler.adapters.rank_pages import GroupPages, RankPages

MAX_LOADS = 4  # the most loads at a time


class AdapterTiers:
    """The tiers of all adapters, by adapter id. `max_host` limits the adapters on the host; None: no limit."""

    def __init__(self, capacity: Capacity, max_host: int | None) -> None:
        self.capacity = capacity
        self.fills = self.evictions = self.loads = self.host_evictions = 0
        self._max_host = max_host
        self._rank_pages = RankPages(capacity.rank_pages)
        self._sources: dict[int, LoadAdapter] = {}
        self._need: dict[int, dict[str, int]] = {}
        self._size: dict[int, int] = {}
        self._wanted: dict[int, None] = {}  # adapters to load, in order
        self._loading: set[int] = set()
        self._host: dict[int, None] = {}  # least recently used first; the same holds for _device
        self._host_bytes = 0
        self._leaving: set[int] = set()
        self._device: dict[int, GroupPages] = {}
        self._filling: set[int] = set()
        self._last_step: dict[int, int] = {}
        self._fills: list[int] = []

    def add(self, source: LoadAdapter) -> None:
        """Adds an adapter if it is new, and queues its load."""
        if source.adapter_id not in self._sources:
            self._sources[source.adapter_id] = source
            self._wanted[source.adapter_id] = None

    def apply(self, state: AdapterState) -> None:
        """Takes the machine's report of an adapter's state."""
        adapter = state.adapter_id
        if state.state == "host":
            self._loading.discard(adapter)
            self._need[adapter], self._size[adapter] = dict(state.footprint.pages), state.bytes
            self._host[adapter] = None
            self._host_bytes += state.bytes
            if not self._rank_pages.lacking(self._need[adapter]):
                self._fills.append(adapter)
        elif state.state == "resident":
            self._filling.discard(adapter)
        elif state.state == "disk":
            self._leaving.discard(adapter)

    def can_hold(self, adapter: int, busy: Container[int]) -> bool:
        """Returns whether the adapter fits on the device beside the `busy` adapters, by eviction if necessary."""
        if adapter in self._device or adapter not in self._need:
            return True
        return self._make_room(adapter, busy, evict=False)

    def resident(self, adapter: int, busy: Container[int]) -> bool:
        """Returns whether the adapter can run now. If not, plans its load or its fill, which may evict others."""
        if adapter in self._device:
            self._touch(adapter)
            return adapter not in self._filling
        if adapter in self._host:
            if adapter not in self._fills and self._make_room(adapter, busy, evict=True):
                self._fills.append(adapter)
        elif adapter not in self._loading and adapter not in self._leaving:
            self._wanted[adapter] = None
        return False

    def lane_pages(self, adapter: int) -> dict[str, list[tuple[int, float]]]:
        """Returns the rank pages of the adapter for its lane, by group, each with scale 1."""
        return {group: [(page, 1.0) for page in pages] for group, pages in self._device[adapter].items()}

    def mark_used(self, adapters: Iterable[int], step: int) -> None:
        """Records that step `step` uses the rank pages of these adapters."""
        for adapter in adapters:
            self._last_step[adapter] = step

    def step_done(self, step: int) -> None:
        """Frees the released rank pages whose last step is done, now that step `step` is."""
        self._rank_pages.step_done(step)

    def plan_fills(self, step: int) -> list[Fill]:
        """Returns the fills of the next step, and grants their rank pages."""
        out = []
        for adapter in self._fills:
            if adapter in self._device or self._rank_pages.lacking(self._need[adapter]):
                continue
            pages = self._rank_pages.grant(self._need[adapter])
            self._device[adapter] = pages
            self._filling.add(adapter)
            self._last_step[adapter] = step
            self.fills += 1
            out.append(Fill(adapter, pages))
        self._fills.clear()
        return out

    def plan_transfers(self, busy: Container[int]) -> list[LoadAdapter | EvictAdapter]:
        """Returns the loads that can begin, and the evictions from the host that make room for them."""
        out: list[LoadAdapter | EvictAdapter] = []
        for adapter in list(self._wanted):
            if len(self._loading) >= MAX_LOADS:
                break
            while self._host_full(adapter) and (victim := self._host_victim(busy)) is not None:
                self._host_bytes -= self._size[victim]
                del self._host[victim]
                self._leaving.add(victim)
                self.host_evictions += 1
                out.append(EvictAdapter(victim))
            if self._host_full(adapter):
                break
            del self._wanted[adapter]
            self._loading.add(adapter)
            self.loads += 1
            out.append(self._sources[adapter])
        return out

    def _host_full(self, adapter: int) -> bool:
        count = len(self._host) + len(self._loading)
        size = self._host_bytes + self._size.get(adapter, 0)
        bound = self.capacity.host_bytes
        return (self._max_host is not None and count >= self._max_host) or bool(bound and size > bound)

    def _host_victim(self, busy: Container[int]) -> int | None:
        """Returns the adapter to evict from the host next: one that is also on the device, else one without a lane."""
        free = [a for a in self._host if a not in self._filling and a not in self._fills]
        on_device = next((a for a in free if a in self._device), None)
        return on_device if on_device is not None else next((a for a in free if a not in busy), None)

    def _make_room(self, adapter: int, busy: Container[int], evict: bool) -> bool:
        lacking = self._rank_pages.lacking(self._need[adapter], with_cooling=True)
        victims = []
        for other, pages in self._device.items():
            if not lacking:
                break
            if other in busy or other in self._filling:
                continue
            victims.append(other)
            left = {group: count - len(pages.get(group, ())) for group, count in lacking.items()}
            lacking = {group: count for group, count in left.items() if count > 0}
        if lacking:
            return False
        for victim in victims if evict else ():
            self._rank_pages.release(self._device.pop(victim), self._last_step[victim])
            self.evictions += 1
        return not evict or not self._rank_pages.lacking(self._need[adapter])

    def _touch(self, adapter: int) -> None:
        self._device[adapter] = self._device.pop(adapter)
        if adapter in self._host:
            self._host[adapter] = self._host.pop(adapter)
