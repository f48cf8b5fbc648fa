"""Applies the results of a step: appends its tokens to the requests, and ends the requests that they finish."""

from __future__ import annotations

from engine.messages import LogprobIds, StepDone, Update
from scheduler.admission.admission import Admission
from scheduler.batching.isolation import Isolation
from scheduler.loading.device_loader import DeviceLoader
from scheduler.progress import pieces
from scheduler.requests.request import Request
from scheduler.requests.stopping import finish_of
from scheduler.state import SchedulerState

MOST_TOKENS = 1 << 31  # above every token id, also of the tokens that adapters add to the vocabulary


class StepResults:
    """Applies the results of the steps in flight, oldest first."""

    def __init__(
        self, state: SchedulerState, admission: Admission, device_loader: DeviceLoader, isolation: Isolation
    ) -> None:
        self._state = state
        self._admission = admission
        self._device_loader = device_loader
        self._isolation = isolation

    def apply(self, done: StepDone) -> None:
        """Applies the results of the oldest step in flight: tokens, log-probabilities and the step's duration.

        Raises AssertionError if `done` does not match that step.
        """
        state = self._state
        in_flight = state.in_flight.pop(0)
        assert in_flight.id == done.id, f"step {done.id} is answered before step {in_flight.id}"
        samples = sum(sampled for _, sampled, _ in in_flight.parts)
        assert len(done.tokens) == samples, f"step {done.id} has {len(done.tokens)} tokens instead of {samples}"
        assert all(0 <= token < MOST_TOKENS for token in done.tokens), f"step {done.id} has a token out of range"
        tokens = iter(done.tokens)
        for index, (request, sampled, scored) in enumerate(in_flight.parts):
            request.steps_in_flight -= 1
            if scored:
                self._add_scores(request, done.prompt_logprobs.get(index, []), scored)
            if sampled:
                request.pending -= 1
                self._append(request, next(tokens), done.logprobs.get(index))
        self._isolation.step_answered(in_flight)
        state.device_cache.step_done(done.id)
        self._device_loader.record_step_seconds(done.seconds)
        state.counters.steps += 1
        state.counters.step_seconds.append(done.seconds)

    def _append(self, request: Request, token: int, logprobs: LogprobIds | None) -> None:
        if request.done:
            return  # it ended while this step was in flight
        state = self._state
        index = request.generated
        request.tokens.append(token)
        if request.row >= 0:
            state.kv.token_known(request)
        state.counters.generation_tokens += 1
        ending = finish_of(request)
        state.updates.append(
            Update(
                request_id=request.id,
                index=index,
                tokens=[token],
                cached_tokens=request.pop_cached(),
                finish=ending[0] if ending else None,
                stop_reason=ending[1] if ending else None,
                logprobs=[logprobs] if logprobs is not None else None,
                queued=0.0 if index else request.queued,
            )
        )
        if ending is not None:
            self._admission.end(request, update=False)

    def _add_scores(self, request: Request, scores: list[LogprobIds], count: int) -> None:
        assert len(scores) == count, f"request {request.id} has {len(scores)} prompt logprobs instead of {count}"
        if not request.done:
            self._state.updates += pieces(request.id, request.generated, request.scores_known, scores)
        request.scores_known += count
