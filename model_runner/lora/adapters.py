"""The adapters of one runner: loaders, host tier, fills, rank pages and backend, behind what a scheduler can ask for.

    LoadAdapter --> loaders --> host tier --> fills --> rank pages <-- lanes
                        '--- advance() -------'--> AdapterState, when there is one

Nothing here waits. Which pages an adapter gets is the scheduler's decision. Knows nothing of rows and steps.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path

from engine.errors import AdapterError, InternalError
from engine.messages import AdapterStage, AdapterState, Fill, Footprint, LanePages, LoadAdapter
from model_runner.lora.backends.base import LoraBackend
from model_runner.lora.normal_form import NormalForm, lane_pages
from model_runner.lora.pool.fills import FillQueue
from model_runner.lora.pool.pages import RankPagePool
from model_runner.lora.site import EMBED, HEAD, full_weights_of
from model_runner.lora.store import AdapterStore, refusal
from model_runner.lora.transfer.loaders import Loaders, Outcome

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Adapters:
    """`max_rank` and `targets` (module names) are what the pages were sized for; `names` are for messages."""

    store: AdapterStore
    loaders: Loaders
    pages: RankPagePool
    fills: FillQueue
    backend: LoraBackend
    max_rank: int
    targets: list[str]
    names: dict[int, str] = field(default_factory=dict)

    def load(self, message: LoadAdapter) -> AdapterState | None:
        """Brings an adapter to the host tier: its state at once if it is there, else when `advance` has it."""
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
        """Frees the adapter's host memory; its pages are the scheduler's to give to others."""
        self.loaders.forget(adapter_id)
        self.store.drop(adapter_id)
        return AdapterState(adapter_id=adapter_id, state="gone")

    def evict(self, adapter_id: int) -> AdapterState:
        """Frees the adapter's host memory; it may be loaded again."""
        adapter = self.store.get(adapter_id)
        self.store.drop(adapter_id)
        if adapter is None:
            return AdapterState(adapter_id=adapter_id, state="disk")
        return _state(adapter, "disk")

    def fill(self, fill: Fill) -> None:
        """Copies an adapter of the host tier into its pages at once, or begins to.

        Raises InternalError when it is not there.
        """
        adapter = self.store.get(fill.adapter_id)
        if adapter is None:
            raise InternalError(f"a fill of adapter {fill.adapter_id}, which is not in the host tier")
        if fill.now:
            self.fills.fill_at_once(adapter, fill.pages)
        else:
            self.fills.add(adapter, fill.pages)

    def point(self, lane: LanePages) -> None:
        """The lane has these pages from now on."""
        self.pages.set_lane(lane)

    def reset(self) -> None:
        """Forgets lanes and fills; the host tier and what is being loaded stay."""
        self.fills.clear()
        self.pages.reset_lanes()

    def advance(self, seconds: float) -> list[AdapterState]:
        """Copies for about so long, and takes what was loaded; what there is to tell."""
        states = [_state(adapter, "resident", took) for adapter, took in self.fills.advance(seconds)]
        return states + [self._loaded(outcome) for outcome in self.loaders.collect()]

    @property
    def wait(self) -> float | None:
        """For how many seconds `advance` need not be called unless the loaders' descriptor is readable."""
        return self.fills.poll_seconds if self.fills else self.loaders.wait

    def name(self, message: LoadAdapter) -> str:
        """What the adapter is called in messages."""
        return message.name or self.names.get(message.adapter_id) or Path(message.path).name

    def refuse(self, adapter_id: int, reason: str) -> AdapterState:
        """The adapter is not served; nothing of it is kept."""
        log.warning("%s", reason)
        self.store.drop(adapter_id)
        return AdapterState(adapter_id=adapter_id, state="failed", error=reason)

    def check_fits(self, name: str, rank: int, targets: list[str], footprint: Footprint, vocab_size: int = 0) -> None:
        """Raises AdapterError for an adapter that the pools or a lane can never hold."""
        base = next(site.vocabulary for site in self.pages.sites if site.group == EMBED)
        added = vocab_size - base
        if added > self.pages.extra_vocab:
            raise AdapterError(
                f"adapter {name!r} has a vocabulary of {vocab_size} tokens, {added} more than the model's, and the pool"
                f" was made for {self.pages.extra_vocab}: launch with --lora-extra-vocab-size {added}, or with such an"
                " adapter in --lora-paths"
            )
        for group, count in footprint.pages.items():
            if group in (full_weights_of(EMBED), full_weights_of(HEAD)) and not self.pages.page_counts.get(group):
                raise AdapterError(
                    f"adapter {name!r} brings a whole embedding or head (modules_to_save), and there is no room for"
                    " one: launch with such an adapter in --lora-paths"
                )
            if count > min(self.pages.page_counts.get(group, 0), lane_pages(self.max_rank)):
                raise AdapterError(
                    f"adapter {name!r} (rank {rank}, {', '.join(targets)}) does not fit the"
                    f" pool made for rank {self.max_rank} on {', '.join(self.targets)}: launch with a higher"
                    " --max-lora-rank or more --lora-target-modules"
                )

    def _loaded(self, outcome: Outcome) -> AdapterState:
        """A load that has ended: the adapter is kept, or refused in one line."""
        message = outcome.message
        name = self.name(message)
        try:
            if outcome.parcel is None:
                raise refusal(name, AdapterError(outcome.reason))
            adapter = self.store.keep(message.adapter_id, name, outcome.parcel)
            self.check_fits(name, adapter.rank, adapter.targets, adapter.footprint, adapter.vocab_size)
        except AdapterError as error:
            return self.refuse(message.adapter_id, error.message)
        except Exception as error:  # whatever is wrong with it, it must not cost the others their runner
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
    )
