"""Plans one step: decodes, then prefill chunks of running rows, then admissions. Does not apply results.

    budget  |<- decodes: 1 token a row ->|<- chunks of rows in prefill ->|<- chunks of rows just admitted ->|
            0                                                                         max_batched_tokens
                                         |<---- max_prefill_tokens at most, if there are decodes ---->|

A request's position (`computed`) advances here, when a chunk is planned. Sampled tokens arrive later, so with several
steps in flight a row is planned on tokens that the scheduler does not know yet. A row that reaches its token limit with
the samples in flight is not planned further.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from engine.messages import Chunk, LanePages, NewRow, Step
from scheduler.admission.admission import Admission
from scheduler.batching.admission_order import AdmissionOrder
from scheduler.batching.isolation import Isolation
from scheduler.batching.preemption import choose_victim
from scheduler.loading.device_loader import DeviceLoader
from scheduler.requests.request import Request
from scheduler.state import InFlightStep, SchedulerState

MOST_SCORES = 1 << 17  # the most log-probabilities of prompt tokens that a step asks for: 2 MB in its StepDone
MOST_NUMBERS = 1 << 20  # numbers in the new rows of a step after which no more rows are admitted: 5 MB in the Step


@dataclass(slots=True)
class _Draft:
    """A step that is being planned.

    `budget`: how many more tokens it may have. `scores` and `numbers`: how many more log-probabilities its StepDone may
    have, and how many more numbers its new rows, which bounds the sizes of both messages.
    """

    in_flight: InFlightStep
    budget: int
    scores: int = MOST_SCORES
    numbers: int = MOST_NUMBERS
    lanes: list[LanePages] = field(default_factory=list)
    new_rows: list[NewRow] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)

    def begin(self, request: Request) -> None:
        """Adds a new row for the request, and subtracts its size from `numbers`."""
        row = NewRow(
            row=request.row,
            generation=request.generation,
            prompt_length=request.prompt_length,
            sampling=request.sampling,
            history=list(request.tokens) if request.needs_history else [],
        )
        self.new_rows.append(row)
        sampling = row.sampling
        ids = len(sampling.end_ids) + len(sampling.allowed_token_ids) + len(sampling.token_ids_logprob)
        words = sum(map(len, sampling.bad_words))
        self.numbers -= len(row.history) + len(request.pages) + ids + words + 3 * len(sampling.logit_bias)

    def most_scored(self, request: Request) -> int:
        """Returns how many of the request's positions the step may still score, at least 1. `add` subtracts them."""
        return max(1, self.scores // request.score_width)

    def add(self, request: Request, chunk: Chunk, scored: int = 0) -> None:
        self.chunks.append(chunk)
        self.in_flight.parts.append((request, chunk.samples, scored))
        self.in_flight.starts.append(chunk.start)
        self.budget -= chunk.length
        if scored:
            self.scores -= scored * request.score_width
            request.scored += scored
        request.steps_in_flight += 1
        request.computed += chunk.length
        request.pending += chunk.samples


class Planner:
    """Plans steps from the scheduler's tables."""

    def __init__(
        self,
        state: SchedulerState,
        admission: Admission,
        device_loader: DeviceLoader,
        admission_order: AdmissionOrder,
        isolation: Isolation,
    ) -> None:
        self._state = state
        self._admission = admission
        self._device_loader = device_loader
        self._admission_order = admission_order
        self._isolation = isolation

    def plan(self, epoch: int, step: int) -> Step | None:
        """Plans and returns step number `step`, which is in flight from now on; None if there is nothing to do now."""
        state, alone = self._state, self._isolation.is_on
        if self._isolation.must_wait:
            return None
        state.kv.begin_step(step)
        if not alone:
            self._admission_order.begin_step()
        draft = _Draft(InFlightStep(step), state.capacity.max_batched_tokens)
        prefills = self._decode(draft)
        if draft.chunks:
            draft.budget = min(draft.budget, state.max_prefill_tokens)
        self._device_loader.begin_step(step, busy=bool(draft.chunks))
        for request in prefills:
            if draft.budget > 0:
                self._prefill(draft, request, [])
        self._admit(draft, self._isolation.next_suspect if alone else self._admission_order.next_request)
        if not alone:
            self._admission_order.end_step()
            self._device_loader.look_ahead()
        fills = self._device_loader.fills
        if not draft.chunks and not fills:
            return None
        state.mark_used(state.lanes.active(), step)
        state.in_flight.append(draft.in_flight)
        return Step(epoch=epoch, id=step, fills=fills, lanes=draft.lanes, new_rows=draft.new_rows, chunks=draft.chunks)

    def _decode(self, draft: _Draft) -> list[Request]:
        """Plans a chunk of one token for each decoding row, in order. Returns the rows in prefill."""
        running, page_size = self._state.running.ordered, self._state.capacity.page_size
        prefills: list[Request] = []
        index = 0
        while index < len(running):
            request = running[index]
            if not request.decoding:
                prefills.append(request)
            elif draft.budget > 0 and len(request.tokens) + request.pending < request.limit:
                position = request.computed
                pages: list[int] = []
                if position == len(request.pages) * page_size:
                    pages = self._grow(request, index)
                    if not pages:
                        continue  # the request itself was preempted: running[index] is the next row, if any
                chunk = Chunk(
                    row=request.row,
                    generation=request.generation,
                    start=position,
                    length=1,
                    lane=request.lane,
                    pages=pages,
                )
                draft.add(request, chunk)
            index += 1
        return prefills

    def _grow(self, request: Request, index: int) -> list[int]:
        """Appends a KV page to `request`, which is running[index], and returns it in a list.

        If no page is free, preempts rows that are not planned yet; returns [] if `request` is preempted itself.
        """
        state = self._state
        while not state.kv.free:
            victim = choose_victim(state.running.ordered[index:], state.running.ordered[0])
            self._admission.preempt(victim)
            if victim is request:
                return []
        return state.kv.append_page(request)

    def _prefill(self, draft: _Draft, request: Request, pages: list[int]) -> None:
        """Plans the next chunk of the request's known tokens. The chunk with the last known token samples.

        `pages`: all of the request's pages with its first chunk, [] afterwards. A chunk ends at the latest where the
        invocation of an activated LoRA begins: the positions before that are computed by the base model.

        If the request asks for prompt logprobs:
            positions start .. scored            were scored before a preemption; the chunk ends there
            positions scored .. prompt_length-1  are scored, each for the token after it
        """
        known, start = len(request.tokens), request.computed
        end = min(known, start + draft.budget)
        if start < request.acts_from:
            end = min(end, request.acts_from)
        scores = False
        if request.scored < request.to_score:
            if start < request.scored:
                end = min(end, request.scored)
            else:
                scores = True
                end = end if known == request.prompt_length else min(end, request.to_score)
                end = min(end, start + draft.most_scored(request))
        samples = end == known
        chunk = Chunk(
            row=request.row,
            generation=request.generation,
            start=start,
            length=end - start,
            lane=request.lane if start >= request.acts_from else 0,
            tokens=request.tokens[start : end + (scores and not samples)],
            pages=pages,
            samples=samples,
            scores=scores,
        )
        request.decoding = samples
        draft.add(request, chunk, scored=(end - start - samples) if scores else 0)
        self._state.kv.chunk_planned(request)

    def _admit(self, draft: _Draft, next_request: Callable[[], Request | None]) -> None:
        """Admits requests while there is budget for their first chunk."""
        state = self._state
        while draft.budget > 0 and draft.numbers > 0 and (request := next_request()) is not None:
            if self._admission.admit(request):
                draft.lanes.append(LanePages(request.lane, state.lane_pages(request.key)))
            draft.begin(request)
            self._prefill(draft, request, list(request.pages))
