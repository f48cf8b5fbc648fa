"""A simulated model runner: takes messages, and sends the results after the (virtual) seconds that a profile gives.

    steps   one after the other:      |gap/2|==== step 7 ====|fills|==== step 8 ====| ...        StepDone gap/2 after
    fills   `at_once`: before the step's forward. Other fills run one after the other: with `fill_share` between steps,
            for this share of each step's time and all idle time; without it, beside the steps
    loads   `loaders` at a time, in order

Only the time is simulated; every sampled token is 0.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from zlib import crc32

from engine.messages import (
    AdapterState,
    EvictAdapter,
    Fill,
    Footprint,
    LoadAdapter,
    Step,
    StepDone,
    UnloadAdapter,
)
from scheduler.simulate.profile import Profile

NEVER = float("inf")


@dataclass(frozen=True, slots=True)
class AdapterOnDisk:
    """An adapter that can be loaded: its LoRA rank, its size, and what it occupies on the device."""

    rank: int
    bytes: int
    footprint: Footprint
    revision: str


def adapter_on_disk(profile: Profile, name: str) -> AdapterOnDisk:
    """Returns the adapter called `name`. Its rank is one of `profile.lora_ranks`, chosen by the hash of the name."""
    stamp = crc32(name.encode())
    rank = profile.lora_ranks[stamp % len(profile.lora_ranks)]
    return AdapterOnDisk(rank, profile.adapter_bytes(rank), profile.footprint(rank), f"{stamp:08x}-{name}")


class Machine:
    """A simulated runner. `adapters` is by adapter id. While `instant` is set, loads and fills take no time."""

    def __init__(self, profile: Profile, adapters: Mapping[int, AdapterOnDisk]) -> None:
        self._profile, self._adapters = profile, adapters
        self.instant = False
        self.busy = 0.0  # seconds spent in steps
        self.rows = self.lanes = 0  # sums over all steps: decoding rows, and lanes
        self.fill_seconds = self.load_seconds = 0.0
        self._events: list[tuple[float, int, StepDone | AdapterState]] = []
        self._number = 0
        self._free_at = 0.0
        self._fills: deque[list[float]] = deque()  # fills between steps: [adapter id, seconds left]
        self._copies_free_at = 0.0
        self._loaders = [0.0] * profile.loaders
        self._lane_bytes: dict[int, int] = {}

    @property
    def next_event(self) -> float:
        """The time of the next message from the machine."""
        soonest = self._events[0][0] if self._events else NEVER
        return min(soonest, self._free_at + self._fills[0][1]) if self._fills else soonest

    def pop(self) -> tuple[float, StepDone | AdapterState]:
        """Removes the next message from the machine and returns (its time, the message)."""
        if self._fills and (not self._events or self._free_at + self._fills[0][1] < self._events[0][0]):
            adapter_id, seconds = self._fills.popleft()
            self._free_at += seconds
            return self._free_at, self._state(int(adapter_id), "resident")
        when, _, message = heapq.heappop(self._events)
        return when, message

    def accept(self, message: Step | LoadAdapter | UnloadAdapter | EvictAdapter, now: float) -> None:
        """Takes a message that the scheduler sends at `now`."""
        match message:
            case Step():
                self._step(message, now)
            case LoadAdapter():
                self._load(message.adapter_id, now)
            case EvictAdapter():
                self._answer(now, self._state(message.adapter_id, "disk"))
            case UnloadAdapter():
                self._answer(now, AdapterState(adapter_id=message.adapter_id, state="gone"))

    # ------------------------------------------------------------------------------------------------------- steps

    def _step(self, step: Step, now: float) -> None:
        half = 0.0 if self.instant else self._profile.gap / 2
        begin = max(now + half, self._free_at)
        if self._fills:
            self._advance_fills(begin - self._free_at)
        first = sum([self._fill(fill, begin) for fill in step.fills])
        for lane in step.lanes:
            sizes = self._profile.unit_bytes
            self._lane_bytes[lane.lane] = sum(16 * sizes[group] * len(pages) for group, pages in lane.pages.items())
        seconds, samples = self._seconds(step)
        seconds += first
        self.busy += seconds
        end = begin + seconds
        self._answer(end + half, StepDone(epoch=step.epoch, id=step.id, tokens=[0] * samples, seconds=seconds))
        self._free_at = end
        if self._fills:
            self._advance_fills(self._profile.fill_share * seconds)

    def _seconds(self, step: Step) -> tuple[float, int]:
        """Returns (the seconds of a step, the number of tokens that it samples)."""
        if not step.chunks:
            return 0.0, 0
        rows = tokens = context = samples = 0
        lanes = set()
        for chunk in step.chunks:
            length = chunk.length
            context += chunk.start + length
            samples += chunk.samples
            if chunk.tokens:
                tokens += length
            else:
                rows += 1
            if chunk.lane:
                lanes.add(chunk.lane)
        cost = self._profile.step
        seconds = cost.base + cost.decode_row * rows + cost.prefill_token * tokens + cost.context_token * context
        self.rows += rows
        self.lanes += len(lanes)
        if lanes:
            size = sum([self._lane_bytes[lane] for lane in lanes])
            seconds += cost.lane * len(lanes) + cost.lane_byte * size
        return seconds, samples

    # ---------------------------------------------------------------------------------------------------- adapters

    def _fill(self, fill: Fill, begin: float) -> float:
        """Begins a fill of a step. Returns the seconds that the step waits for the fill."""
        seconds = 0.0 if self.instant else self._profile.fill.of(self._adapters[fill.adapter_id].bytes)
        self.fill_seconds += seconds
        if fill.at_once:
            self._answer(begin + seconds, self._state(fill.adapter_id, "resident", seconds))
            return seconds
        if self._profile.fill_share and not self.instant:
            self._fills.append([fill.adapter_id, seconds])
        else:
            self._copies_free_at = max(begin, self._copies_free_at) + seconds
            self._answer(self._copies_free_at, self._state(fill.adapter_id, "resident", seconds))
        return 0.0

    def _advance_fills(self, seconds: float) -> None:
        """Spends up to `seconds` seconds on fills, from the time at which the machine is free."""
        while self._fills and seconds > 0:
            adapter_id, left = self._fills[0]
            spent = min(left, seconds)
            self._free_at += spent
            seconds -= spent
            if spent < left:
                self._fills[0][1] = left - spent
            else:
                self._fills.popleft()
                self._answer(self._free_at, self._state(int(adapter_id), "resident"))

    def _load(self, adapter_id: int, now: float) -> None:
        seconds = 0.0 if self.instant else self._profile.load.of(self._adapters[adapter_id].bytes)
        self.load_seconds += seconds
        end = max(now, heapq.heappop(self._loaders)) + seconds
        heapq.heappush(self._loaders, end)
        self._answer(end, self._state(adapter_id, "host", seconds))

    def _state(self, adapter_id: int, state: str, seconds: float = 0.0) -> AdapterState:
        adapter = self._adapters[adapter_id]
        return AdapterState(
            adapter_id=adapter_id,
            state=state,  # type: ignore[arg-type]
            revision=adapter.revision,
            footprint=adapter.footprint,
            bytes=adapter.bytes,
            lora_rank=adapter.rank,
            seconds=seconds,
        )

    def _answer(self, when: float, message: StepDone | AdapterState) -> None:
        self._number += 1
        heapq.heappush(self._events, (when, self._number, message))
