"""The records of an adapter name (Adapter) and of the copy of its weights that the name refers to (AdapterCopy).

    Adapter 1 (a name, a client's id) ---+
                                         +--> AdapterCopy (one revision, host copy, footprint, part of a lane)
    Adapter 2 (the same revision) -------+

    host     DISK --LoadAdapter--> LOADING --"host"--> HELD --EvictAdapter--> EVICTING --"disk"--> DISK
    device   NONE --Fill--> FILLING --"resident"--> RESIDENT --evicted--> NONE     a fill needs the host state HELD
             NONE --Fill(at_once)---------------> RESIDENT

Each part has one writer: only HostCache writes `AdapterCopy.host`, only DeviceCache writes `AdapterCopy.device`, and
only AdapterRegistry writes the other fields of a copy or an adapter (tests/scheduler/adapters/test_writers.py checks
this).
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
    """Whether the runner has the weights of a copy in host memory, is loading or evicting them, or has none (DISK)."""

    DISK = "disk"
    LOADING = "loading"
    HELD = "held"
    EVICTING = "evicting"


class DeviceState(Enum):
    """Whether a copy has rank pages, and whether its weights are already in them (RESIDENT)."""

    NONE = "none"
    FILLING = "filling"
    RESIDENT = "resident"


@dataclass(slots=True, eq=False)
class HostCopy:
    """The host cache's fields of a copy. Only HostCache writes them."""

    state: HostState = HostState.DISK
    held_since: int = 0  # the tick at which its last load ended, by which fifo eviction sorts
    known_to_runner: bool = False  # a load was sent to the present runner, so an unload must be sent to it too
    tried_paths: list[str] = field(default_factory=list)  # the paths that its current load was sent with


@dataclass(slots=True, eq=False)
class DeviceCopy:
    """The device cache's fields of a copy. Only DeviceCache writes them."""

    state: DeviceState = DeviceState.NONE
    pages: GroupPages = field(default_factory=dict)  # its rank pages by group; empty in state NONE
    lanes: int = 0  # how many lanes contain the copy; it is evicted only if there are none
    last_step: int = 0  # the last step that names its pages: once this step is done, the pages may be filled again
    filled_since: int = 0  # the tick at which it became resident, by which fifo eviction sorts
    last_used: int = 0  # the tick at which it became resident or was last released by a lane, whichever is later
    fills_in_flight: int = 0  # fills whose end the runner has not reported yet: they read the host copy


@dataclass(slots=True, eq=False)
class References:
    """The requests and the preload that need a copy. Only AdapterRegistry writes them."""

    requests: int = 0  # requests, running or waiting, whose lane key contains it
    last_used: int = 0  # the tick at which the last of its requests ended
    preload_order: Order | None = None  # set while a client's preload is open: the order of its fill among requests


@dataclass(slots=True, eq=False)
class AdapterCopy:
    """The weights of one revision, shared by all adapters that have it. A new adapter has its own until it is loaded.

    Only AdapterRegistry writes the fields other than `host` and `device`.
    """

    id: int  # the id of the adapter that it was made for; lane keys contain it, so it never changes
    runner_id: int  # its id in messages to and from the runner
    info: AdapterState  # its revision, footprint and size, as far as they are known
    loaded_once: bool = False  # a load has ended successfully, so `info` is complete
    names: dict[int, Adapter] = field(default_factory=dict)  # the adapters that refer to this copy, by id
    pinned: bool = False  # True if one of its adapters is pinned: the copy is not evicted
    error: str | None = None  # why it cannot be served; the same files may be loaded again under a new id
    is_unloading: bool = False  # none of its adapters accepts requests, and the runner is freeing its memory
    references: References = field(default_factory=References)
    host: HostCopy = field(default_factory=HostCopy)
    device: DeviceCopy = field(default_factory=DeviceCopy)

    @property
    def identity(self) -> str:
        """The key of the copy's KV pages: its revision, so that the pages stay valid when its adapters are unloaded."""
        return self.info.revision or f"copy {self.id}"

    @property
    def pages_needed(self) -> Mapping[str, int]:
        """The copy's footprint: rank pages by group."""
        return self.info.footprint.pages

    @property
    def last_used(self) -> int:
        """The tick of the copy's last use, by which lru eviction sorts."""
        return max(self.references.last_used, self.device.last_used, self.host.held_since)

    @property
    def is_wanted(self) -> bool:
        """Whether a request or a preload needs the copy."""
        return self.references.requests > 0 or self.references.preload_order is not None

    @property
    def on_device(self) -> bool:
        """Whether the copy holds rank pages."""
        return self.device.state is not DeviceState.NONE

    @property
    def on_host(self) -> bool:
        """Whether the copy counts against the limits of the host cache."""
        return self.host.state is not HostState.DISK

    @property
    def can_fill(self) -> bool:
        """Whether a fill may begin: the copy is on the host and has no rank pages."""
        return self.device.state is DeviceState.NONE and self.host.state is HostState.HELD

    @property
    def needs_load(self) -> bool:
        """Whether the copy must be loaded from disk before it can be used, and its load has not begun."""
        return self.device.state is DeviceState.NONE and self.host.state is HostState.DISK

    @property
    def may_load(self) -> bool:
        """Whether a load may begin: the copy needs one, has not failed, and is not being unloaded."""
        return self.needs_load and self.error is None and not self.is_unloading

    @property
    def stage(self) -> AdapterStage:
        """The copy's state as reported to the tokenizer process."""
        if self.error is not None:
            return "failed"
        if self.device.state is DeviceState.RESIDENT:
            return "resident"
        if self.host.state in (HostState.HELD, HostState.EVICTING):
            return "host"
        return "disk" if self.loaded_once and self.host.state is HostState.DISK else "loading"


@dataclass(slots=True, eq=False)
class Adapter:
    """One adapter as a client loaded it, by its id. Only AdapterRegistry writes its fields."""

    id: int
    source: LoadAdapter  # the client's message that loaded it
    copy: AdapterCopy  # replaced if its revision turns out to be the revision of an existing copy
    pinned: bool = False
    requests: int = 0  # requests, running or waiting, that name it
    draining: bool = False  # it accepts no new requests, and is removed when its last request ends

    def to_message(self, seconds: float = 0.0, error: str | None = None) -> AdapterState:
        """Returns the adapter's state as a message to the tokenizer process.

        `error`: what failed, if the adapter can still be served.
        """
        stage = self.copy.stage
        if self.draining and stage != "failed":
            stage = "draining"
        error = self.copy.error or error
        return replace(self.copy.info, adapter_id=self.id, state=stage, seconds=seconds, error=error)
