"""An adapter's name and the copy of its weights that it stands for. Knows nothing of requests, lanes or bounds.

Adapter 1 (a name, an id upstream) --+
                                     +--> Copy (one revision: one host copy, one footprint, one part of a lane)
Adapter 2 (equal bytes) -------------+

host     DISK --LoadAdapter--> LOADING --"host"--> HELD --EvictAdapter--> EVICTING --"disk"--> DISK
device   NONE --Fill--> FILLING --"resident"--> RESIDENT --evicted--> NONE         a fill reads the host copy: HELD
         NONE --Fill(now)-------------------> RESIDENT
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from msgspec.structs import replace

from engine.messages import AdapterStage, AdapterState, LoadAdapter
from scheduler.adapters.rank_pages import GroupPages
from scheduler.types import Order


class Host(Enum):
    """Where its bytes are."""

    DISK = "disk"
    LOADING = "loading"
    HELD = "held"
    EVICTING = "evicting"


class Device(Enum):
    """Whether it has rank pages."""

    NONE = "none"
    FILLING = "filling"
    RESIDENT = "resident"


@dataclass(slots=True, eq=False)
class Copy:
    """The weights of one revision, as far as it is known: until the first load has answered, every adapter has its own.

    `id` is that of the first adapter that stood for it, for good: lane keys are made of it. `holder` is the id under
    which the runner has it. `card` is what was learnt (`known`: from a load). `users` counts promised lane keys,
    `requests` live requests that name it; `last_step` is the last step to name its pages. `last_used`, `held_since` and
    `filled_since` are the ticks that eviction goes by. `wish`: it is to become resident unasked, in this place of the
    queue. `error`: it cannot be served; the same files may be, under a new id. `sent`: the runner has heard of it.
    `leaving`: the runner is to free it. `tried`: the paths of the load under way. `fills`: those that the runner has
    not answered; they read the host copy. One at once makes it resident when it is planned, see loading/device_loader.
    """

    id: int
    runner_id: int
    info: AdapterState
    names: dict[int, Adapter] = field(default_factory=dict)
    known: bool = False
    host: Host = Host.DISK
    device: Device = Device.NONE
    pages: GroupPages = field(default_factory=dict)
    pinned: bool = False
    users: int = 0
    requests: int = 0
    last_step: int = 0
    last_used: int = 0
    held_since: int = 0
    filled_since: int = 0
    preload_order: Order | None = None
    error: str | None = None
    sent_to_runner: bool = False
    is_unloading: bool = False
    fills: int = 0
    tried_paths: list[str] = field(default_factory=list)

    @property
    def identity(self) -> str:
        """What its KV pages are known by: its bytes, whatever its names."""
        return self.info.revision or f"copy {self.id}"

    @property
    def need(self) -> Mapping[str, int]:
        """Its footprint: pages by group."""
        return self.info.footprint.pages

    @property
    def on_device(self) -> bool:
        """Whether it holds its pages."""
        return self.device is not Device.NONE

    @property
    def on_host(self) -> bool:
        """Whether it takes room in the host tier."""
        return self.host is not Host.DISK

    @property
    def can_fill(self) -> bool:
        """Whether it waits in the host tier for pages."""
        return self.device is Device.NONE and self.host is Host.HELD

    @property
    def to_load(self) -> bool:
        """Whether it must be read before it can be used, and nothing is under way."""
        return self.device is Device.NONE and self.host is Host.DISK

    @property
    def stage(self) -> AdapterStage:
        """What is told of it."""
        if self.error is not None:
            return "failed"
        if self.device is Device.RESIDENT:
            return "resident"
        if self.host in (Host.HELD, Host.EVICTING):
            return "host"
        return "disk" if self.known and self.host is Host.DISK else "loading"


@dataclass(slots=True, eq=False)
class Adapter:
    """One name. `source` is how it was asked for; `requests` counts live requests that name it."""

    id: int
    source: LoadAdapter
    copy: Copy
    pinned: bool = False
    requests: int = 0
    draining: bool = False

    def to_message(self, seconds: float = 0.0, error: str | None = None) -> AdapterState:
        """What the tokenizer process is told of it now. `error`: what did not work, where it can be served still."""
        stage = self.copy.stage
        if self.draining and stage != "failed":
            stage = "draining"
        error = self.copy.error or error
        return replace(self.copy.info, adapter_id=self.id, state=stage, seconds=seconds, error=error)
