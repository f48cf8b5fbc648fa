"""The adapters of one runner: host tier, rank pages and backend, behind the four things a scheduler can ask for.

Which pages an adapter gets is the scheduler's decision. Knows nothing of rows and steps.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path

from engine.errors import AdapterError, InternalError
from engine.messages import AdapterStage, AdapterState, Fill, LanePages, LoadAdapter
from model_runner import memory
from model_runner.lora.adapter import Adapter
from model_runner.lora.base import LoraBackend
from model_runner.lora.pages import RankPages
from model_runner.lora.store import AdapterStore

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Adapters:
    """`max_rank` and `targets` (module names) are what the pages were sized for; `names` are for messages."""

    store: AdapterStore
    pages: RankPages
    backend: LoraBackend
    max_rank: int
    targets: list[str]
    names: dict[int, str] = field(default_factory=dict)

    def load(self, message: LoadAdapter) -> AdapterState:
        """Brings an adapter to the host tier; one that cannot be served is state failed with the reason."""
        name = self.names.get(message.adapter_id, Path(message.path).name)
        try:
            adapter = self.store.load(message.adapter_id, name, Path(message.path), message.revision)
            self.check_fits(adapter)
        except AdapterError as error:
            return self.refuse(message.adapter_id, error.message)
        except Exception as error:  # whatever is wrong with it, it must not cost the others their runner
            log.exception("adapter %r cannot be loaded", name)
            return self.refuse(message.adapter_id, f"adapter {name!r}: {type(error).__name__}: {error}")
        return _state(adapter, "host")

    def refuse(self, adapter_id: int, reason: str) -> AdapterState:
        """The adapter is not served; nothing of it is kept."""
        self.store.drop(adapter_id)
        return AdapterState(adapter_id=adapter_id, state="failed", error=reason)

    def unload(self, adapter_id: int) -> AdapterState:
        """Frees the adapter's host memory; its pages are the scheduler's to give to others."""
        self.store.drop(adapter_id)
        return AdapterState(adapter_id=adapter_id, state="gone")

    def fill(self, fill: Fill) -> AdapterState:
        """Copies an adapter of the host tier into its pages. Raises InternalError when it is not there."""
        adapter = self.store.get(fill.adapter_id)
        if adapter is None:
            raise InternalError(f"a fill of adapter {fill.adapter_id}, which is not in the host tier")
        self.pages.fill(adapter, fill.pages)
        return _state(adapter, "resident")

    def point(self, lane: LanePages) -> None:
        """The lane has these pages from now on."""
        self.pages.set_lane(lane)

    def check_fits(self, adapter: Adapter) -> None:
        """Raises AdapterError for an adapter that the pools or a lane can never hold."""
        if adapter.footprint.vectors or adapter.footprint.matrices:
            raise AdapterError(f"adapter {adapter.name!r}: gains, biases and whole matrices are not served yet")
        for group, count in adapter.footprint.pages.items():
            if count > min(self.pages.pages.get(group, 0), memory.lane_pages(self.max_rank)):
                raise AdapterError(
                    f"adapter {adapter.name!r} (rank {adapter.rank}, {', '.join(adapter.targets)}) does not fit the"
                    f" pool made for rank {self.max_rank} on {', '.join(self.targets)}: launch with a higher"
                    " --max-lora-rank or more --lora-target-modules"
                )


def _state(adapter: Adapter, stage: AdapterStage) -> AdapterState:
    return AdapterState(
        adapter_id=adapter.adapter_id,
        state=stage,
        revision=adapter.revision,
        footprint=adapter.footprint,
        bytes=adapter.bytes,
        lora_rank=adapter.rank,
        target_modules=adapter.targets,
    )
