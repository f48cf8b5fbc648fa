"""One adapter under its id: its source, its last known state, and how many requests use it.

Knows nothing of selections, HTTP or the scheduler's link.
"""

from __future__ import annotations

import asyncio
import contextlib
import time

from engine.config.process_configs import AdapterSource
from engine.messages import AdapterCard, AdapterStage, AdapterState
from tokenizer_proc.adapters.tokenizers import TextTools


class Entry:
    """One adapter under its id, which is never reused. `draining`: its name was taken, and its requests finish.

    `preload`: the load call waits until the adapter is resident. `vocab_size` is the size of a vocabulary of its own,
    0: the base's vocabulary. `text_tools` None: the base's.
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
        """The adapter's name, also after the name was taken from it."""
        return self.source.name

    @property
    def is_loaded(self) -> bool:
        """The weights are on the host or on the device, or were, and can be read from disk again."""
        state = self.state
        return state.state in ("host", "resident") or (state.state == "disk" and state.revision != "")

    @property
    def stage(self) -> AdapterStage:
        """The state that clients are shown."""
        return "draining" if self.draining and self.state.state not in ("gone", "failed") else self.state.state

    def update(self, state: AdapterState) -> None:
        """Stores a new state and wakes the calls that wait for one."""
        self.state = state
        if state.revision:
            self.vocab_size = state.vocab_size
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def settled(self) -> AdapterState:
        """Waits until the load has succeeded or failed, and returns the state."""
        while not self.is_loaded and self.state.state not in ("failed", "gone"):
            await self._changed.wait()
        return self.state

    async def reaches(self, stage: AdapterStage, seconds: float) -> bool:
        """Waits up to `seconds` for `stage` or a final state (gone, failed). Returns whether `stage` was reached."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self.state.state not in (stage, "gone", "failed"):
                    await self._changed.wait()
        return self.state.state == stage

    def release(self) -> None:
        """Marks that the name was taken from the adapter."""
        self.draining, self.released = True, time.monotonic()

    def card(self, parent: str) -> AdapterCard:
        """The facts that clients are shown. `parent` is the base's name where the adapter's files name none."""
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
