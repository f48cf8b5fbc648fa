"""Decides when a step may be planned while another is in flight, from the sizes and times of earlier steps.

A GPU computes beside the host, so its next step is planned at once. On a CPU the runner itself computes: an early plan
only fixes the batch early, and a request that arrives after the plan misses a step. So on a CPU the plan is held back
until shortly before the step in flight is expected to end:

    step n     |==========================|
    plan n+1                        ^ LEAD before the end
    arrivals   ....... in n+1 ......|. in n+2

If overlapping steps makes them slower, the plan waits for the end of the step: see scheduler.batching.overlap_tuner.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from engine.messages import Step, StepDone
from scheduler.batching.overlap_tuner import OverlapTuner

LEAD_SECONDS = 0.003  # the next step is planned at least this long before the expected end of the step in flight
LEAD_SHARE = 0.2  # and at least this share of the step's expected time before it: the times of long steps vary more
LOOK_BACK = 4  # the expected time of a step is the least of this many steps of its kind (decode only, or with prefill)


@dataclass(frozen=True)
class _TimedStep:
    """The size of a step in flight."""

    id: int
    rows: int
    tokens: int
    prompt_tokens: int  # the tokens of chunks with more than one token


class AsyncGate:
    """Limits the steps in flight to `window`, and with `hold_back` delays the plan of a step beside another one.

    The delay is derived from the times of the last decode or prefill steps.
    """

    def __init__(self, window: int, hold_back: bool, tuner: OverlapTuner | None = None) -> None:
        self._window, self._hold_back = window, hold_back
        self._tuner = tuner or OverlapTuner()
        self._in_flight: deque[_TimedStep] = deque()
        self._decodes: deque[float] = deque(maxlen=LOOK_BACK)  # seconds per step
        self._prefills: deque[float] = deque(maxlen=LOOK_BACK)  # seconds per token
        self._began = 0.0  # when the oldest step in flight began
        self._ended: float | None = None  # when the last step ended; None if there was nothing to plan since then

    def step_sent(self, step: Step, now: float) -> None:
        """Records that a step was sent to the runner at time `now`."""
        if not self._in_flight:
            self._began = now
        lengths = [chunk.length for chunk in step.chunks]
        prompt_tokens = sum(length for length in lengths if length > 1)
        self._in_flight.append(_TimedStep(step.id, len(lengths), sum(lengths), prompt_tokens))

    def step_done(self, done: StepDone, now: float) -> None:
        """Records that a step ended at time `now`, and that the next step in flight began then."""
        while self._in_flight and self._in_flight[0].id <= done.id:
            step = self._in_flight.popleft()
            if step.id == done.id:
                self._learn(step, done.seconds, now)
                self._ended = now
        self._began = now

    def nothing_to_plan(self) -> None:
        """Records that there is no work, so that the time until the next step is not counted as part of a step."""
        if not self._in_flight:
            self._ended = None

    @property
    def due(self) -> float:
        """The time from which one more step may be planned; infinity if none may be before a step in flight ends."""
        if len(self._in_flight) >= self._window:
            return float("inf")
        if not self._in_flight or not self._hold_back:
            return float("-inf")
        if not self._tuner.pays:
            return float("inf")
        step = self._in_flight[0]
        known = self._prefills if step.prompt_tokens else self._decodes
        expected = min(known, default=0.0) * (step.tokens if step.prompt_tokens else min(step.tokens, 1))
        return self._began + expected - max(LEAD_SECONDS, LEAD_SHARE * expected)  # a step with only fills: 0 expected

    def _learn(self, step: _TimedStep, seconds: float, now: float) -> None:
        if step.tokens == 0:
            return  # the step contained only fills
        if step.prompt_tokens:
            self._prefills.append(seconds / step.tokens)
        else:
            self._decodes.append(seconds)
        if self._ended is not None and now > self._ended:
            self._tuner.step_took(step.rows, step.prompt_tokens, now - self._ended, seconds)
