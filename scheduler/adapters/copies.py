"""An adapter's name, and the copy of its weights that the name stands for. Knows nothing of requests, lanes or limits.

    Adapter 1 (a name, an id upstream) --+
                                         +--> AdapterCopy (one revision, host copy, footprint, part of a lane)
    Adapter 2 (equal bytes) -------------+

    host     DISK --LoadAdapter--> LOADING --"host"--> HELD --EvictAdapter--> EVICTING --"disk"--> DISK
    device   NONE --Fill--> FILLING --"resident"--> RESIDENT --evicted--> NONE     a fill reads the host copy: HELD
             NONE --Fill(at_once)---------------> RESIDENT

Each part has one writer: HostCache alone writes `AdapterCopy.host`, DeviceCache alone `AdapterCopy.device`, and
AdapterRegistry everything else of a copy or an adapter. tests/scheduler/adapters/test_writers.py holds them to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from msgspec.structs import replace

from engine.messages import AdapterStage, AdapterState, LoadAdapter
from scheduler.adapters.rank_pages import GroupPages
from scheduler.types import Order


class HostState(Enum):
    """Where the bytes of a copy are."""

    DISK = "disk"
    LOADING = "loading"
    HELD = "held"
    EVICTING = "evicting"


class DeviceState(Enum):
    """Whether a copy has rank pages."""

    NONE = "none"
    FILLING = "filling"
    RESIDENT = "resident"


@dataclass(slots=True, eq=False)
class HostCopy:
    """A copy in the host cache. Written by HostCache alone."""

    state: HostState = HostState.DISK
    held_since: int = 0  # the tick at which its last load ended; fifo eviction goes by it
    known_to_runner: bool = False  # a load was sent to this runner, so the runner must be told of an unload
    tried_paths: list[str] = field(default_factory=list)  # the paths that its current load was sent with


@dataclass(slots=True, eq=False)
class DeviceCopy:
    """A copy in rank pages. Written by DeviceCache alone."""

    state: DeviceState = DeviceState.NONE
    pages: GroupPages = field(default_factory=dict)  # its rank pages by group; empty in state NONE
    lanes: int = 0  # lanes that contain it; with one it is not evicted
    last_step: int = 0  # the last step that names its pages: they may be filled again once it is done
    filled_since: int = 0  # the tick at which it became resident; fifo eviction goes by it
    last_used: int = 0  # the tick at which it became resident, or a lane released it
    fills_in_flight: int = 0  # fills that the runner has not answered: they read the host copy


@dataclass(slots=True, eq=False)
class References:
    """What needs a copy. Written by AdapterRegistry alone."""

    requests: int = 0  # requests, running or waiting, whose lane key contains it
    last_used: int = 0  # the tick at which the last of its requests ended
    preload_order: Order | None = None  # a client wants it resident; its fill has this place among the requests


@dataclass(slots=True, eq=False)
class AdapterCopy:
    """The weights of one revision. Until its first load is answered, an adapter has a copy of its own.

    Everything but `host` and `device` is written by AdapterRegistry alone.
    """

    id: int  # the id of the first adapter that stood for it; lane keys contain it, so it never changes
    runner_id: int  # the id under which the runner knows it
    info: AdapterState  # its revision, footprint and size, as far as they are known
    loaded_once: bool = False  # a load was answered, so `info` is complete
    names: dict[int, Adapter] = field(default_factory=dict)  # the adapters that stand for it, by id
    pinned: bool = False  # one of its adapters is pinned: it is not evicted
    error: str | None = None  # why it cannot be served; the same files may be loaded again under a new id
    is_unloading: bool = False  # it has no adapter that accepts requests, and the runner frees it
    references: References = field(default_factory=References)
    host: HostCopy = field(default_factory=HostCopy)
    device: DeviceCopy = field(default_factory=DeviceCopy)

    @property
    def identity(self) -> str:
        """The key of its KV pages: its revision, so that they outlive its names."""
        return self.info.revision or f"copy {self.id}"

    @property
    def pages_needed(self) -> Mapping[str, int]:
        """Its footprint: rank pages by group."""
        return self.info.footprint.pages

    @property
    def last_used(self) -> int:
        """The tick of its last use; lru eviction goes by it."""
        return max(self.references.last_used, self.device.last_used, self.host.held_since)

    @property
    def is_wanted(self) -> bool:
        """Whether a request or a preload needs it."""
        return self.references.requests > 0 or self.references.preload_order is not None

    @property
    def on_device(self) -> bool:
        """Whether it holds rank pages."""
        return self.device.state is not DeviceState.NONE

    @property
    def on_host(self) -> bool:
        """Whether it takes room in the host cache."""
        return self.host.state is not HostState.DISK

    @property
    def can_fill(self) -> bool:
        """Whether it is on the host and has no rank pages."""
        return self.device.state is DeviceState.NONE and self.host.state is HostState.HELD

    @property
    def needs_load(self) -> bool:
        """Whether it must be read from disk before it can be used, and its load has not begun."""
        return self.device.state is DeviceState.NONE and self.host.state is HostState.DISK

    @property
    def may_load(self) -> bool:
        """Whether a load may begin: it needs one, and was neither refused nor unloaded."""
        return self.needs_load and self.error is None and not self.is_unloading

    @property
    def stage(self) -> AdapterStage:
        """Its state as reported to the tokenizer process."""
        if self.error is not None:
            return "failed"
        if self.device.state is DeviceState.RESIDENT:
            return "resident"
        if self.host.state in (HostState.HELD, HostState.EVICTING):
            return "host"
        return "disk" if self.loaded_once and self.host.state is HostState.DISK else "loading"


@dataclass(slots=True, eq=False)
class Adapter:
    """One name of a copy. Written by AdapterRegistry alone."""

    id: int
    source: LoadAdapter  # the request to load it
    copy: AdapterCopy  # changes when its revision turns out to be that of another copy
    pinned: bool = False
    requests: int = 0  # requests, running or waiting, that name it
    draining: bool = False  # it accepts no new requests, and goes with its last one

    def to_message(self, seconds: float = 0.0, error: str | None = None) -> AdapterState:
        """Its state for the tokenizer process. `error`: what failed though the adapter can still be served."""
        stage = self.copy.stage
        if self.draining and stage != "failed":
            stage = "draining"
        error = self.copy.error or error
        return replace(self.copy.info, adapter_id=self.id, state=stage, seconds=seconds, error=error)
