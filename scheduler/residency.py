"""Where every adapter is, and the rank pages it holds. Knows nothing of requests, lanes or queues.

    LoadAdapter        AdapterState host       grant + Fill        AdapterState resident
        |                     |                     |                     |
     LOADING ------------> HOST -----------------> FILLING ----------> RESIDENT
        |                     ^                     |                     |
        +--> FAILED <---------|---------------------+                     |
                              +---------------- evicted (LRU) <-----------+  not pinned, no user

A user is a lane key that was promised the adapter: it waits for the fill, for a lane, or runs. An adapter without users
is idle: its pages go to others, the longest idle first. Grants are all or nothing for all adapters of a key.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum

from msgspec.structs import replace

from engine.messages import AdapterStage, AdapterState, Capacity, Fill, LoadAdapter
from scheduler.rank_pages import GroupPages, RankPages
from scheduler.request import LaneKey


class Stage(Enum):
    """Where an adapter is."""

    LOADING = "loading"
    HOST = "host"
    FILLING = "filling"
    RESIDENT = "resident"
    FAILED = "failed"
    UNLOADING = "unloading"


_TOLD: dict[Stage, AdapterStage] = {
    Stage.LOADING: "loading",
    Stage.HOST: "host",
    Stage.FILLING: "host",
    Stage.RESIDENT: "resident",
    Stage.FAILED: "failed",
    Stage.UNLOADING: "draining",
}


@dataclass(slots=True, eq=False)
class Adapter:
    """One adapter. `source` is how it was asked for, `card` what is known of it since.

    `users` counts promised keys, `requests` live requests that name it; `last_step` is the last one to name its pages.
    """

    id: int
    source: LoadAdapter
    pinned: bool
    card: AdapterState
    stage: Stage = Stage.LOADING
    pages: GroupPages = field(default_factory=dict)
    users: int = 0
    requests: int = 0
    draining: bool = False
    last_step: int = 0

    @property
    def need(self) -> Mapping[str, int]:
        """Its footprint: pages by group."""
        return self.card.footprint.pages

    @property
    def on_device(self) -> bool:
        """Whether it holds its pages."""
        return self.stage in (Stage.FILLING, Stage.RESIDENT)

    def report(self) -> AdapterState:
        """What the tokenizer process is told of it now."""
        draining = self.draining and self.stage is not Stage.FAILED
        return replace(self.card, state="draining" if draining else _TOLD[self.stage])


class Residency:
    """The adapters, and who among them holds rank pages."""

    def __init__(self, capacity: Capacity) -> None:
        self._adapters: dict[int, Adapter] = {}
        self._idle: dict[int, None] = {}  # resident, evictable; the longest idle first
        self._pinned: dict[int, Adapter] = {}
        self.reset(capacity)

    def reset(self, capacity: Capacity) -> list[Adapter]:
        """A new runner holds nothing: all that can be served is to be loaded again. Returns those."""
        self._capacity = capacity
        self.rank_pages = RankPages(capacity.rank_pages)
        self._idle.clear()
        again = []
        for adapter in self._adapters.values():
            adapter.pages, adapter.users, adapter.last_step = {}, 0, 0
            if adapter.stage not in (Stage.FAILED, Stage.UNLOADING):
                adapter.stage = Stage.LOADING
                again.append(adapter)
        return again

    def __iter__(self) -> Iterator[Adapter]:
        return iter(self._adapters.values())

    def get(self, adapter_id: int) -> Adapter | None:
        """The adapter, if it is known."""
        return self._adapters.get(adapter_id)

    def load(self, message: LoadAdapter) -> Adapter:
        """A new adapter, or a failed one tried again."""
        card = AdapterState(adapter_id=message.adapter_id, state="loading", revision=message.revision)
        adapter = Adapter(message.adapter_id, message, message.pinned, card)
        self._adapters[adapter.id] = adapter
        self.pin(adapter, message.pinned)
        return adapter

    def loaded(self, adapter: Adapter, card: AdapterState) -> None:
        """The runner has it in the host tier."""
        assert adapter.stage is Stage.LOADING
        adapter.card, adapter.stage = card, Stage.HOST

    def filled(self, adapter: Adapter) -> None:
        """The runner answered the fill: lanes may name its pages."""
        assert adapter.stage is Stage.FILLING
        adapter.stage = Stage.RESIDENT
        self._rest(adapter)

    def failed(self, adapter: Adapter, reason: str) -> None:
        """It cannot be served. Nobody may be using it."""
        assert adapter.users == 0, f"adapter {adapter.id} fails while it has users"
        self._free(adapter)
        adapter.stage = Stage.FAILED
        adapter.card = replace(adapter.card, state="failed", error=reason)

    def unload(self, adapter: Adapter) -> None:
        """Takes its pages; it is gone when the runner says so. Nobody may be using it."""
        assert adapter.users == 0, f"adapter {adapter.id} is unloaded while it has users"
        self._free(adapter)
        adapter.stage = Stage.UNLOADING

    def forget(self, adapter: Adapter) -> None:
        """It is gone."""
        self._free(adapter)
        del self._adapters[adapter.id]
        self._pinned.pop(adapter.id, None)

    def pin(self, adapter: Adapter, pinned: bool) -> None:
        """Keeps it from eviction, or no longer."""
        adapter.pinned = pinned
        if pinned:
            self._pinned[adapter.id] = adapter
        else:
            self._pinned.pop(adapter.id, None)
        self._rest(adapter)

    # ------------------------------------------------------------------------------------------------ keys as users

    def adapters(self, key: LaneKey) -> list[Adapter]:
        """The adapters of a key; all must be known."""
        return [self._adapters[adapter_id] for adapter_id, _ in key]

    def problem(self, key: LaneKey) -> str | None:
        """Why a key can never be served, judging by what is known now."""
        unknown = [adapter_id for adapter_id, _ in key if adapter_id not in self._adapters]
        if unknown:
            return f"adapter {unknown[0]} is not loaded; load it first"
        adapters = self.adapters(key)
        for adapter in adapters:
            if adapter.stage is Stage.FAILED:
                return adapter.card.error or f"adapter {adapter.id} failed to load"
        for group, count in _sum(adapters).items():
            if count > self._capacity.rank_pages.get(group, 0):
                return (
                    f"the adapter needs {count} LoRA rank pages of group {group}, but there are "
                    f"{self._capacity.rank_pages.get(group, 0)}; raise --max-lora-rank or widen --lora-target-modules"
                )
            if count > self._capacity.max_lane_pages:
                return (
                    f"the adapter or mix is {count} rank pages long in group {group}, but a lane holds at most "
                    f"{self._capacity.max_lane_pages}; mix fewer adapters or raise --max-lora-rank"
                )
        return None

    def promise(self, key: LaneKey) -> None:
        """The key becomes a user of its adapters, which all hold their pages."""
        for adapter in self.adapters(key):
            assert adapter.on_device, f"adapter {adapter.id} is promised without pages"
            adapter.users += 1
            self._rest(adapter)

    def release(self, key: LaneKey) -> None:
        """The key is no longer a user."""
        for adapter in self.adapters(key):
            adapter.users -= 1
            assert adapter.users >= 0, f"adapter {adapter.id} is released once too often"
            self._rest(adapter)

    def make_room(self, adapters: list[Adapter]) -> list[Adapter]:
        """Evicts what `adapters` need to have pages: those idle longest, or nobody if that is not enough.

        Pages that steps in flight name are not free at once: they cool, and the next call finds them.
        """
        need = _sum(adapter for adapter in adapters if adapter.stage is Stage.HOST)
        lacking = self.rank_pages.lacking(need, with_cooling=True)
        victims = self._victims(lacking, {adapter.id for adapter in adapters}) if lacking else []
        for adapter in victims:
            self._free(adapter)
            adapter.stage = Stage.HOST
        return victims

    def grant(self, adapters: list[Adapter], step: int) -> list[Fill] | None:
        """Pages for those of `adapters` that have none, all or nothing: what step `step` is to fill."""
        missing = [adapter for adapter in adapters if adapter.stage is Stage.HOST]
        if self.rank_pages.lacking(_sum(missing)):
            return None
        return [self._start_fill(adapter, step) for adapter in missing]

    def hopeless(self, adapters: list[Adapter]) -> str | None:
        """Why `adapters` could not even have pages if everything unpinned made room."""
        wanted = {adapter.id for adapter in adapters}
        pinned = [a for a in self._pinned.values() if a.on_device and a.id not in wanted]
        for group, count in _sum([*adapters, *pinned]).items():
            if count > self._capacity.rank_pages.get(group, 0):
                return f"the adapter does not fit beside the pinned ones (LoRA rank pages of group {group}); unpin one"
        return None

    def lane_pages(self, key: LaneKey) -> dict[str, list[tuple[int, float]]]:
        """What the key's lane holds: (page, scale) by group, the adapters sorted by revision."""
        scales = dict(key)
        pages: dict[str, list[tuple[int, float]]] = {}
        for adapter in sorted(self.adapters(key), key=lambda a: (a.card.revision, a.id)):
            assert adapter.stage is Stage.RESIDENT, f"adapter {adapter.id} is not resident"
            for group, numbers in adapter.pages.items():
                pages.setdefault(group, []).extend((page, scales[adapter.id]) for page in numbers)
        return pages

    def named(self, keys: Iterable[LaneKey], step: int) -> None:
        """Step `step` names the pages of these keys."""
        for key in keys:
            for adapter in self.adapters(key):
                adapter.last_step = step

    def resident(self) -> list[int]:
        """The adapters that lanes may name."""
        return [adapter.id for adapter in self._adapters.values() if adapter.stage is Stage.RESIDENT]

    def audit(self, users: Mapping[int, int], requests: Mapping[int, int]) -> None:
        """Proves that pages, users and requests (given by adapter) are all accounted for."""
        self.rank_pages.audit(adapter.pages for adapter in self._adapters.values())
        for adapter in self._adapters.values():
            name = f"adapter {adapter.id} ({adapter.stage.name})"
            assert adapter.users == users.get(adapter.id, 0), f"{name} counts {adapter.users} users"
            assert adapter.requests == requests.get(adapter.id, 0), f"{name} counts {adapter.requests} requests"
            held = {group: len(numbers) for group, numbers in adapter.pages.items()}
            expected = {group: count for group, count in adapter.need.items() if count} if adapter.on_device else {}
            assert held == expected, f"{name} holds {held} of {expected}"
            idle = adapter.stage is Stage.RESIDENT and not adapter.users and not adapter.pinned
            assert idle == (adapter.id in self._idle), f"{name} is idle, or listed so, but not both"
        assert set(users) <= set(self._adapters), "a key uses an adapter that is gone"
        assert set(self._pinned) == {a.id for a in self._adapters.values() if a.pinned}, "the pinned ones are others"

    def _victims(self, lacking: dict[str, int], keep: set[int]) -> list[Adapter]:
        victims: list[Adapter] = []
        for adapter_id in self._idle:
            adapter = self._adapters[adapter_id]
            if adapter_id in keep or not (adapter.pages.keys() & lacking.keys()):
                continue
            victims.append(adapter)
            left = {group: count - len(adapter.pages.get(group, ())) for group, count in lacking.items()}
            lacking = {group: count for group, count in left.items() if count > 0}
            if not lacking:
                return victims
        return []

    def _start_fill(self, adapter: Adapter, step: int) -> Fill:
        adapter.pages = self.rank_pages.grant(adapter.need)
        adapter.stage, adapter.last_step = Stage.FILLING, step
        return Fill(adapter.id, {group: list(numbers) for group, numbers in adapter.pages.items()})

    def _free(self, adapter: Adapter) -> None:
        self.rank_pages.release(adapter.pages, adapter.last_step)
        adapter.pages = {}
        self._idle.pop(adapter.id, None)

    def _rest(self, adapter: Adapter) -> None:
        if adapter.stage is Stage.RESIDENT and not adapter.users and not adapter.pinned:
            self._idle.setdefault(adapter.id)
        else:
            self._idle.pop(adapter.id, None)


def _sum(adapters: Iterable[Adapter]) -> dict[str, int]:
    total: dict[str, int] = {}
    for adapter in adapters:
        for group, count in adapter.need.items():
            if count:
                total[group] = total.get(group, 0) + count
    return total
