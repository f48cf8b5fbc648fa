"""When a step may be planned while another still runs. Knows clocks and the sizes of steps, not what is in them.

A device that computes beside the host wants its next step at once. A CPU computes in the runner itself: there an
early plan only settles early who is in the step, and whoever arrives after it waits for one step more. So the plan is
held until shortly before the step in flight is expected to end:

    step n     |==========================|
    plan n+1                        ^ LEAD before the end
    arrivals   ....... in n+1 ......|. in n+2

Where that does not pay, the end of the step is waited for: see scheduler.batching.overlap_tuner.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from engine.messages import Step, StepDone
from scheduler.batching.overlap_tuner import OverlapTuner

LEAD_SECONDS = 0.003
LEAD_SHARE = 0.2  # of the step, where that is more: long steps vary by more than milliseconds
MEMORY = 4  # steps of a kind that the expectation looks back on: their shortest


@dataclass(frozen=True)
class _Flight:
    """A step on its way."""

    id: int
    rows: int
    tokens: int
    prompt: int  # tokens of those that are not decoding


class AsyncGate:
    """Expects a step's end from the last ones of its kind. `holds` False: every step may be planned at once."""

    def __init__(self, window: int, holds: bool, overlap: OverlapTuner | None = None) -> None:
        self._window, self._holds = window, holds
        self._overlap = overlap or OverlapTuner()
        self._flights: deque[_Flight] = deque()
        self._decodes: deque[float] = deque(maxlen=MEMORY)  # seconds of a step
        self._prefills: deque[float] = deque(maxlen=MEMORY)  # seconds of a token
        self._began = 0.0
        self._ended: float | None = None  # the step before, if there was work ever since

    def sent(self, step: Step, now: float) -> None:
        """A step is on its way to the runner."""
        if not self._flights:
            self._began = now
        lengths = [chunk.length for chunk in step.chunks]
        prompt = sum(length for length in lengths if length > 1)
        self._flights.append(_Flight(step.id, len(lengths), sum(lengths), prompt))

    def done(self, done: StepDone, now: float) -> None:
        """A step has ended, and the one behind it has begun."""
        while self._flights and self._flights[0].id <= done.id:
            flight = self._flights.popleft()
            if flight.id == done.id:
                self._learn(flight, done.seconds, now)
                self._ended = now
        self._began = now

    def rests(self) -> None:
        """There is nothing to plan: what follows the last step's end is no part of the next one."""
        if not self._flights:
            self._ended = None

    @property
    def due(self) -> float:
        """The time from which one more step may be planned; infinite where only a step's end can allow it."""
        if len(self._flights) >= self._window:
            return float("inf")
        if not self._flights or not self._holds:
            return float("-inf")
        if not self._overlap.pays:
            return float("inf")
        flight = self._flights[0]
        known = self._prefills if flight.prompt else self._decodes
        expected = min(known, default=0.0) * (flight.tokens if flight.prompt else min(flight.tokens, 1))
        return self._began + expected - max(LEAD_SECONDS, LEAD_SHARE * expected)  # at once: nothing known, fills only

    def _learn(self, flight: _Flight, seconds: float, now: float) -> None:
        if flight.tokens == 0:
            return  # fills only
        if flight.prompt:
            self._prefills.append(seconds / flight.tokens)
        else:
            self._decodes.append(seconds)
        if self._ended is not None and now > self._ended:
            self._overlap.took(flight.rows, flight.prompt, now - self._ended, seconds)
