"""The entry of one adapter: its id and source, its last known state, and the number of requests that use it."""

from __future__ import annotations

import asyncio
import contextlib
import time

from msgspec.structs import replace

from engine.config.process_configs import AdapterSource
from engine.messages import AdapterCard, AdapterStage, AdapterState
from tokenizer_proc.adapters.tokenizers import TextTools


class Entry:
    """One adapter, identified by an id that is never reused.

    `draining` is True once the adapter has lost its name; its open requests still finish. With `preload` the load call
    waits until the adapter is resident. `vocab_size` is the size of the adapter's own vocabulary, or 0 if it uses the
    base's. With `text_tools` None the adapter uses the base's text tools.
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
        self._refusal = ""
        self._changed = asyncio.Event()

    @property
    def name(self) -> str:
        """The name that the adapter was loaded under, even if that name has since been removed or re-pointed."""
        return self.source.name

    @property
    def is_loaded(self) -> bool:
        """Whether the weights are on the host or the device, or were there and can be read from disk again."""
        state = self.state
        return state.state in ("host", "resident") or (state.state == "disk" and state.revision != "")

    @property
    def stage(self) -> AdapterStage:
        """The state that clients see: `draining` while a nameless adapter's requests finish, else the last state."""
        return "draining" if self.draining and self.state.state not in ("gone", "failed") else self.state.state

    def refuse(self, reason: str) -> None:
        """Makes the adapter failed, whatever states follow, until it is gone."""
        self._refusal = reason
        self.update(self.state)

    def update(self, state: AdapterState) -> None:
        """Stores a new state and wakes the calls that wait for a state change."""
        if self._refusal and state.state != "gone":
            state = replace(state, state="failed", error=self._refusal)
        self.state = state
        if state.revision:
            self.vocab_size = state.vocab_size
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def settled(self) -> AdapterState:
        """Waits until the load has succeeded or failed. Returns the state."""
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
        """Marks the adapter as draining, because its name was removed or re-pointed."""
        self.draining, self.released = True, time.monotonic()

    def card(self, parent: str) -> AdapterCard:
        """Returns the adapter's description for clients. `parent` is used if the adapter's files name no base model."""
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
            notes=state.notes,
        )
