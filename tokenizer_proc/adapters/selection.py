"""One adapter under its id (Entry), and what one request runs through (AdapterSelection): entries with their scales.

A request holds the entries it resolved, not their names. Knows nothing of names' owners, HTTP or the scheduler.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator

import msgspec

from engine.config.sections import AdapterSource
from engine.messages import AdapterCard, AdapterStage, AdapterState
from tokenizer_proc.adapters.tokenizers import TextTools


class Entry:
    """One adapter under its id, which is never reused. `draining`: its name was taken, and it is on its way out.

    `preload`: whoever loaded it waits until it is resident. `vocab_size` are the tokens of a vocabulary of its own, 0:
    the base's. `text_tools` is how it reads and writes, None: as the base.
    """

    def __init__(self, source: AdapterSource, preload: bool = False, text_tools: TextTools | None = None) -> None:
        self.source = source
        self.text_tools = text_tools
        self.preload = preload
        self.state = AdapterState(adapter_id=source.adapter_id, state="loading")
        self.in_flight = 0
        self.created = int(time.time())
        self.draining = False
        self.released = 0.0
        self.vocab_size = 0
        self._changed = asyncio.Event()

    @property
    def name(self) -> str:
        """What it is, or was, called."""
        return self.source.name

    @property
    def is_loaded(self) -> bool:
        """Its weights are in the host tier or nearer, or were, and can be read again."""
        state = self.state
        return state.state in ("host", "resident") or (state.state == "disk" and state.revision != "")

    @property
    def stage(self) -> AdapterStage:
        """Where it is, as people are told."""
        return "draining" if self.draining and self.state.state not in ("gone", "failed") else self.state.state

    def take(self, state: AdapterState) -> None:
        """News of it; whoever waits looks again."""
        self.state = state
        if state.revision:
            self.vocab_size = state.vocab_size
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def settled(self) -> AdapterState:
        """Waits until its load has ended, one way or the other."""
        while not self.is_loaded and self.state.state not in ("failed", "gone"):
            await self._changed.wait()
        return self.state

    async def reaches(self, stage: AdapterStage, seconds: float) -> bool:
        """Waits for a state (or for one that ends everything) so long; whether it came."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self.state.state not in (stage, "gone", "failed"):
                    await self._changed.wait()
        return self.state.state == stage

    def release(self) -> None:
        """Its name is taken from it."""
        self.draining, self.released = True, time.monotonic()

    def card(self, parent: str) -> AdapterCard:
        """What is told about it; `parent` is the base it says it belongs to, else the one that is served."""
        state = self.state
        return AdapterCard(
            name=self.source.name,
            adapter_id=self.source.adapter_id,
            path=self.source.path,
            root=self.source.root,
            parent=self.source.base or parent,
            revision=state.revision,
            state=self.stage,
            pinned=self.source.pinned,
            lora_rank=state.lora_rank,
            target_modules=state.target_modules,
            bytes=state.bytes,
            running=self.in_flight,
            created=self.created,
            vocab_size=self.vocab_size,
            brings=list(self.text_tools.brings) if self.text_tools is not None else [],
            invocation=state.invocation,
        )


class AdapterSelection(msgspec.Struct, frozen=True):
    """What one request runs through: entries with their scales; none = the base."""

    parts: list[tuple[Entry, float]] = []

    @property
    def lora(self) -> list[tuple[int, float]]:
        """The selection as the scheduler knows it."""
        return [(entry.source.adapter_id, scale) for entry, scale in self.parts]

    @property
    def names(self) -> list[str]:
        """The adapters by name."""
        return [entry.source.name for entry, _ in self.parts]

    @property
    def speaker(self) -> Entry | None:
        """The one adapter that it is, unchanged; None for the base, a mix, and an adapter that is scaled."""
        return self.parts[0][0] if len(self.parts) == 1 and self.parts[0][1] == 1.0 else None

    @property
    def text_tools(self) -> TextTools | None:
        """How it reads and writes: as its adapters do where they agree, else as the base (None)."""
        found = {id(entry.text_tools): entry.text_tools for entry, _ in self.parts}
        return next(iter(found.values())) if len(found) == 1 else None

    @property
    def stranger(self) -> str | None:
        """An adapter that only goes by itself, because of its vocabulary, and does not here."""
        return next((entry.name for entry, _ in self.parts if entry.vocab_size and self.speaker is not entry), None)

    @property
    def activated(self) -> str | None:
        """An adapter that acts from its invocation on, and is mixed with others, each of which begins elsewhere."""
        mixed = self.parts if len(self.parts) > 1 else []
        return next((entry.name for entry, _ in mixed if entry.state.invocation), None)

    @property
    def pages(self) -> dict[str, int]:
        """Rank pages a lane of it takes in each group, as far as the footprints are known."""
        pages: dict[str, int] = {}
        for entry, _ in self.parts:
            for group, count in entry.state.footprint.pages.items():
                pages[group] = pages.get(group, 0) + count
        return pages

    @property
    def failure(self) -> str | None:
        """Why one of its adapters cannot be served any more."""
        for entry, _ in self.parts:
            if entry.state.state == "failed":
                return f"adapter `{entry.source.name}`: {entry.state.error or 'it could not be loaded'}"
        return None

    @contextlib.contextmanager
    def held(self, count: int = 1) -> Iterator[None]:
        """Counts `count` requests as users of every part while entered."""
        for entry, _ in self.parts:
            entry.in_flight += count
        try:
            yield
        finally:
            for entry, _ in self.parts:
                entry.in_flight -= count
