"""When a step may be planned while another is in flight. Knows clocks and the sizes of steps, not their requests.

A GPU computes beside the host, so its next step is planned at once. On a CPU the runner itself computes: an early plan
only fixes the batch early, and a request that arrives later misses a step. So there the plan is held back until shortly
before the step in flight is expected to end:

    step n     |==========================|
    plan n+1                        ^ LEAD before the end
    arrivals   ....... in n+1 ......|. in n+2

Where overlapping does not pay, the plan waits for the end of the step: see scheduler.batching.overlap_tuner.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from engine.messages import Step, StepDone
from scheduler.batching.overlap_tuner import OverlapTuner

LEAD_SECONDS = 0.003
LEAD_SHARE = 0.2  # of the step, where that is more: long steps vary by more than milliseconds
LOOK_BACK = 4  # steps of a kind, the shortest of which is expected again


@dataclass(frozen=True)
class _TimedStep:
    """The size of a step in flight."""

    id: int
    rows: int
    tokens: int
    prompt_tokens: int  # of chunks with more than one token


class AsyncGate:
    """Expects a step's end from the last steps of its kind. With `hold_back` False each step may be planned at once."""

    def __init__(self, window: int, hold_back: bool, tuner: OverlapTuner | None = None) -> None:
        self._window, self._hold_back = window, hold_back
        self._tuner = tuner or OverlapTuner()
        self._in_flight: deque[_TimedStep] = deque()
        self._decodes: deque[float] = deque(maxlen=LOOK_BACK)  # seconds of a step
        self._prefills: deque[float] = deque(maxlen=LOOK_BACK)  # seconds of a token
        self._began = 0.0
        self._ended: float | None = None  # of the last step, unless there was nothing to plan since

    def step_sent(self, step: Step, now: float) -> None:
        """A step was sent to the runner."""
        if not self._in_flight:
            self._began = now
        lengths = [chunk.length for chunk in step.chunks]
        prompt_tokens = sum(length for length in lengths if length > 1)
        self._in_flight.append(_TimedStep(step.id, len(lengths), sum(lengths), prompt_tokens))

    def step_done(self, done: StepDone, now: float) -> None:
        """A step has ended, and the next one in flight has begun."""
        while self._in_flight and self._in_flight[0].id <= done.id:
            step = self._in_flight.popleft()
            if step.id == done.id:
                self._learn(step, done.seconds, now)
                self._ended = now
        self._began = now

    def nothing_to_plan(self) -> None:
        """There is no work: the time from the last step's end to the next step is not counted as part of a step."""
        if not self._in_flight:
            self._ended = None

    @property
    def due(self) -> float:
        """The time from which one more step may be planned; infinite where only a step's end can allow it."""
        if len(self._in_flight) >= self._window:
            return float("inf")
        if not self._in_flight or not self._hold_back:
            return float("-inf")
        if not self._tuner.pays:
            return float("inf")
        step = self._in_flight[0]
        known = self._prefills if step.prompt_tokens else self._decodes
        expected = min(known, default=0.0) * (step.tokens if step.prompt_tokens else min(step.tokens, 1))
        return self._began + expected - max(LEAD_SECONDS, LEAD_SHARE * expected)  # expected is 0 for fills alone

    def _learn(self, step: _TimedStep, seconds: float, now: float) -> None:
        if step.tokens == 0:
            return  # fills alone
        if step.prompt_tokens:
            self._prefills.append(seconds / step.tokens)
        else:
            self._decodes.append(seconds)
        if self._ended is not None and now > self._ended:
            self._tuner.step_took(step.rows, step.prompt_tokens, now - self._ended, seconds)
