"""A scheduler of simple lists with the admission rule of another engine. Used by the simulator only.

It works like the real core (decodes first, chunked prefill, preemption of the latest row, memory tiers, fills beside
the steps, several steps in flight), so that the main difference is the order of admissions. It has no prefix cache and
no mixes, and counts KV pages instead of numbering them.

    waiting, in order of arrival:   r1  r2  r3  r4  r5 ...
                                    |   |   |   '-- lacks pages or a row: no later request is admitted
                                    |   |   '-- not resident: its adapter gets a lane and is fetched; the walk goes on
                                    |   '-- the rule refuses it: the walk goes on
                                    '-- admitted
"""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.messages import (
    AdapterState,
    Chunk,
    EvictAdapter,
    Generate,
    LanePages,
    LoadAdapter,
    NewRow,
    Progress,
    Stats,
    Step,
    StepDone,
    ToScheduler,
    Update,
)
from scheduler.simulate.baselines.adapter_tiers import AdapterTiers
from scheduler.simulate.baselines.request import BaselineRequest
from scheduler.simulate.baselines.rules import SkipAhead


@dataclass(slots=True)
class _Draft:
    budget: int
    chunks: list[Chunk] = field(default_factory=list)
    rows: list[NewRow] = field(default_factory=list)
    lanes: list[LanePages] = field(default_factory=list)
    parts: list[tuple[BaselineRequest, bool]] = field(default_factory=list)


class BaselineScheduler:
    """The baseline scheduler. `tiers` keeps the adapters; `rule` decides which requests may be admitted."""

    def __init__(self, tiers: AdapterTiers, rule: SkipAhead, window: int = 1) -> None:
        self._tiers, self._rule, self._window = tiers, rule, window
        capacity = tiers.capacity
        self._page, self._budget = capacity.page_size, capacity.max_batched_tokens
        self._free_pages = capacity.kv_pages
        self._free_rows = list(range(capacity.rows - 1, -1, -1))
        self._waiting: list[BaselineRequest] = []
        self._running: list[BaselineRequest] = []
        self._lanes: dict[int, int] = {}  # adapter: lane number
        self._free_lanes = list(range(capacity.max_loras, 0, -1))
        self._in_flight: list[tuple[int, list[tuple[BaselineRequest, bool]]]] = []
        self._updates: list[Update] = []
        self._steps = self._arrivals = self._preemptions = 0

    # ----------------------------------------------------------------------------------------------------- methods

    def handle(self, message: ToScheduler, now: float) -> list[object]:
        """Handles one message. Returns the messages to send."""
        match message:
            case StepDone():
                self._apply(message)
            case Generate():
                self._arrivals += 1
                adapter = message.lora[0][0] if message.lora else 0
                self._waiting.append(BaselineRequest(message, now, adapter, self._arrivals))
            case LoadAdapter():
                self._tiers.add(message)
            case AdapterState():
                self._tiers.apply(message)
        return self.drain_outbox()

    def plan(self, now: float) -> Step | None:
        """Returns the next step, or None if the window is full or there is nothing to do."""
        if len(self._in_flight) >= self._window:
            return None
        draft = _Draft(self._budget)
        self._decode(draft)
        for request in self._running:
            if not request.prefilled and draft.budget > 0:
                self._prefill(request, draft)
        self._admit(draft, now)
        fills = self._tiers.plan_fills(self._steps + 1)
        if not draft.chunks and not fills:
            return None
        self._steps += 1
        self._tiers.mark_used(self._lanes, self._steps)
        self._in_flight.append((self._steps, draft.parts))
        return Step(epoch=0, id=self._steps, fills=fills, lanes=draft.lanes, new_rows=draft.rows, chunks=draft.chunks)

    def drain_outbox(self) -> list[object]:
        """Returns the messages to send since the last call."""
        out: list[object] = [Progress(0, self._updates)] if self._updates else []
        self._updates = []
        transfers: list[LoadAdapter | EvictAdapter] = self._tiers.plan_transfers(self._lanes)
        return out + transfers

    def stats(self) -> Stats:
        """Returns the counters that the report shows."""
        tiers = self._tiers
        return Stats(
            running=len(self._running),
            waiting=len(self._waiting),
            steps=self._steps,
            preemptions=self._preemptions,
            adapter_fills=tiers.fills,
            adapter_evictions=tiers.evictions,
            adapter_loads=tiers.loads,
            host_evictions=tiers.host_evictions,
        )

    def check(self) -> None:
        """Asserts that each row, KV page and lane is either free or held, and that each running adapter has a lane."""
        capacity = self._tiers.capacity
        assert len(self._running) + len(self._free_rows) == capacity.rows
        assert sum(request.pages for request in self._running) + self._free_pages == capacity.kv_pages
        assert len(self._lanes) + len(self._free_lanes) == capacity.max_loras
        assert {request.adapter for request in self._running} - {0} <= self._lanes.keys()

    # ------------------------------------------------------------------------------------------------------- a step

    def _decode(self, draft: _Draft) -> None:
        for request in list(self._running):
            wanted = request.prefilled and request.row >= 0 and request.sent < request.message.stopping.max_tokens
            if wanted and draft.budget > 0 and self._grow(request, request.computed + 1):
                self._add(request, draft, 1, [], samples=True)

    def _grow(self, request: BaselineRequest, length: int) -> bool:
        """Gives the request KV pages for `length` positions, by preempting the latest rows if necessary.

        Returns False if the request itself was preempted.
        """
        need = -(-length // self._page) - request.pages
        while need > self._free_pages:
            victim = self._running[-1]
            self._preemptions += 1
            self._leave(victim)
            victim.computed, victim.prefilled, victim.sent = 0, False, victim.known
            at = next((i for i, other in enumerate(self._waiting) if other.order > victim.order), len(self._waiting))
            self._waiting.insert(at, victim)
            if victim is request:
                return False
        self._free_pages -= need
        request.pages += need
        return True

    def _prefill(self, request: BaselineRequest, draft: _Draft) -> None:
        length = min(draft.budget, request.length - request.computed)
        request.prefilled = request.computed + length == request.length
        self._add(request, draft, length, [0] * length, samples=request.prefilled)

    def _add(self, request: BaselineRequest, draft: _Draft, length: int, tokens: list[int], samples: bool) -> None:
        draft.chunks.append(
            Chunk(
                row=request.row,
                generation=1,
                start=request.computed,
                length=length,
                lane=self._lanes.get(request.adapter, 0),
                tokens=tokens,
                samples=samples,
            )
        )
        draft.parts.append((request, samples))
        draft.budget -= length
        request.computed += length
        request.sent += samples
        request.steps_in_flight += 1

    def _admit(self, draft: _Draft, now: float) -> None:
        """Walks the queue in order, and admits the requests that the rule, lanes and memory allow."""
        self._rule.begin(self._waiting, self._longest(), not self._free_lanes, now)
        admitted: set[int] = set()
        for request in self._waiting:
            if draft.budget <= 0:
                break
            if not self._rule.permits(request, self._lanes, self._tiers.capacity.max_loras):
                continue
            if request.adapter and not self._has_lane(request.adapter):
                continue
            need = -(-request.length // self._page)
            if request.steps_in_flight or not self._free_rows or need + len(self._running) > self._free_pages:
                break
            self._enter(request, draft)
            admitted.add(request.order)
        if admitted:
            self._waiting = [request for request in self._waiting if request.order not in admitted]

    def _has_lane(self, adapter: int) -> bool:
        """Gives the adapter a lane if it fits on the device, and fetches it. Returns whether it can run now."""
        if adapter not in self._lanes:
            if not self._tiers.can_hold(adapter, self._lanes):
                return False
            self._lanes[adapter] = self._free_lanes.pop()
        return self._tiers.resident(adapter, self._lanes)

    def _enter(self, request: BaselineRequest, draft: _Draft) -> None:
        request.row = self._free_rows.pop()
        self._running.append(request)
        self._running.sort(key=lambda each: each.order)
        self._grow(request, request.length)
        if request.adapter:
            draft.lanes.append(LanePages(self._lanes[request.adapter], self._tiers.lane_pages(request.adapter)))
        sampling = request.message.sampling
        draft.rows.append(NewRow(row=request.row, generation=1, prompt_length=1, sampling=sampling, history=[]))
        self._prefill(request, draft)

    def _longest(self) -> dict[int, int]:
        """Returns, by running adapter, the most tokens that one of its requests may still generate."""
        longest: dict[int, int] = {}
        for request in self._running:
            if request.adapter:
                longest[request.adapter] = max(longest.get(request.adapter, 0), request.remaining)
        return longest

    # ------------------------------------------------------------------------------------------------------ results

    def _apply(self, done: StepDone) -> None:
        number, parts = self._in_flight.pop(0)
        assert number == done.id
        self._tiers.step_done(number)
        for request, samples in parts:
            request.steps_in_flight -= 1
            if not samples:
                continue
            index, last = request.known, request.remaining == 1
            request.known += 1
            finish = "length" if last else None
            self._updates.append(
                Update(request_id=request.message.request_id, index=index, tokens=[0], finish=finish)  # type: ignore[arg-type]
            )
            if request.row < 0:
                request.sent = request.known
                if last:
                    self._waiting.remove(request)
            elif last:
                self._leave(request)

    def _leave(self, request: BaselineRequest) -> None:
        """Frees the request's row and pages, and its lane if no other request of its adapter is running."""
        self._running.remove(request)
        self._free_rows.append(request.row)
        self._free_pages += request.pages
        request.row, request.pages = -1, 0
        adapter = request.adapter
        if adapter and not any(other.adapter == adapter for other in self._running):
            self._free_lanes.append(self._lanes.pop(adapter))
