"""The adapters of one runner: executes the scheduler's messages to load, unload, evict and fill, and to set lanes.

    LoadAdapter --> loaders --> host tier --> fills --> rank pages <-- lanes
                        '--- advance() -------'--> AdapterState

No call blocks. The scheduler decides which pages an adapter is filled into. Does not depend on rows and steps.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path

from engine.errors import AdapterError, InternalError
from engine.messages import AdapterStage, AdapterState, Fill, LanePages, LoadAdapter
from model_runner.lora.backends.base import LoraBackend
from model_runner.lora.loading.loader_pool import LoaderPool, LoadOutcome
from model_runner.lora.normal_form import NormalForm
from model_runner.lora.pool.fills import FillQueue
from model_runner.lora.pool.fit import PoolFit
from model_runner.lora.pool.pages import RankPagePool
from model_runner.lora.store import AdapterStore, refusal

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Adapters:
    """Loaders, host tier, fills, rank pages and LoRA backend of one runner.

    `fit` checks that an adapter fits the rank pages. `names` maps adapter ids to names for errors.
    """

    store: AdapterStore
    loaders: LoaderPool
    pages: RankPagePool
    fills: FillQueue
    backend: LoraBackend
    fit: PoolFit
    names: dict[int, str] = field(default_factory=dict)

    def load(self, message: LoadAdapter) -> AdapterState | None:
        """Loads an adapter into the host tier.

        Returns its state if it is loaded already or refused at once, else None: `advance` returns the state later.
        """
        name = self.name(message)
        try:
            known = self.store.known(message.adapter_id, name, message.revision)
        except AdapterError as error:
            return self.refuse(message.adapter_id, error.message)
        if known is not None:
            return _state(known, "host")
        self.loaders.submit(message)
        return None

    def unload(self, adapter_id: int) -> AdapterState:
        """Frees the adapter's host memory and cancels its load. The scheduler frees the adapter's rank pages."""
        self.loaders.cancel(adapter_id)
        self.store.drop(adapter_id)
        return AdapterState(adapter_id=adapter_id, state="gone")

    def evict(self, adapter_id: int) -> AdapterState:
        """Frees the adapter's host memory. The adapter may be loaded again later."""
        adapter = self.store.get(adapter_id)
        self.store.drop(adapter_id)
        if adapter is None:
            return AdapterState(adapter_id=adapter_id, state="disk")
        return _state(adapter, "disk")

    def fill(self, fill: Fill) -> None:
        """Copies an adapter of the host tier into its pages, or queues the copy.

        Raises InternalError for an adapter that is not in the host tier.
        """
        adapter = self.store.get(fill.adapter_id)
        if adapter is None:
            raise InternalError(f"a fill of adapter {fill.adapter_id}, which is not in the host tier")
        if fill.at_once:
            self.fills.fill_at_once(adapter, fill.pages)
        else:
            self.fills.add(adapter, fill.pages)

    def set_lane(self, lane: LanePages) -> None:
        """Sets the pages of a lane and their scales."""
        self.pages.set_lane(lane)

    def reset(self) -> None:
        """Removes all lanes and fills. The host tier and the loads under way are kept."""
        self.fills.clear()
        self.pages.reset_lanes()

    def advance(self, seconds: float) -> list[AdapterState]:
        """Copies fills for about `seconds` and collects finished loads. Returns the states that changed."""
        states = [_state(adapter, "resident", took) for adapter, took in self.fills.advance(seconds)]
        return states + [self._loaded(outcome) for outcome in self.loaders.collect()]

    @property
    def poll_seconds(self) -> float | None:
        """Seconds after which `advance` must be called even if the loaders' descriptor is not readable; None: never."""
        return self.fills.poll_seconds if self.fills else self.loaders.poll_seconds

    @property
    def descriptor(self) -> int:
        """The file descriptor that becomes readable when a loader has sent something."""
        return self.loaders.fileno()

    def start(self) -> None:
        """Starts a loader process ahead of the first load."""
        self.loaders.start()

    def close(self) -> None:
        """Ends the loader processes."""
        self.loaders.close()

    def name(self, message: LoadAdapter) -> str:
        """Returns the adapter's name for errors and logs."""
        return message.name or self.names.get(message.adapter_id) or Path(message.path).name

    def refuse(self, adapter_id: int, reason: str, server_fault: bool = False) -> AdapterState:
        """Drops the adapter and logs `reason`. Returns its state "failed" with this reason."""
        log.warning("%s", reason)
        self.store.drop(adapter_id)
        return AdapterState(adapter_id=adapter_id, state="failed", error=reason, server_fault=server_fault)

    def _loaded(self, outcome: LoadOutcome) -> AdapterState:
        """Keeps the adapter of a finished load, or refuses it with a one-line error. Returns its state."""
        message = outcome.message
        name = self.name(message)
        try:
            if outcome.adapter is None:
                raise refusal(name, AdapterError(outcome.reason))
            adapter = self.store.keep(message.adapter_id, name, outcome.adapter)
            self.fit.check(name, message.path, adapter)
        except AdapterError as error:
            return self.refuse(message.adapter_id, error.message, outcome.server_fault)
        except Exception as error:  # a faulty adapter must not end the runner, which serves other adapters
            log.exception("adapter %r cannot be kept", name)
            return self.refuse(message.adapter_id, f"adapter {name!r}: {type(error).__name__}: {error}")
        log.info("adapter %r: %.1f MB loaded in %.2f s", name, adapter.bytes / 1e6, outcome.seconds)
        return _state(adapter, "host", outcome.seconds)


def _state(adapter: NormalForm, stage: AdapterStage, seconds: float = 0.0) -> AdapterState:
    return AdapterState(
        adapter_id=adapter.adapter_id,
        state=stage,
        revision=adapter.revision,
        footprint=adapter.footprint,
        bytes=adapter.bytes,
        lora_rank=adapter.rank,
        target_modules=adapter.targets,
        seconds=seconds,
        vocab_size=adapter.vocab_size,
        invocation=adapter.invocation,
        notes=adapter.notes,
    )
