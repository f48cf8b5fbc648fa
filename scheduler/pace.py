"""When a step may be planned while another still runs. Knows clocks and the sizes of steps, not what is in them.

A device that computes beside the host wants its next step at once. A CPU computes in the runner itself: there an
early plan only settles early who is in the step, and whoever arrives after it waits for one step more. So the plan is
held until shortly before the step in flight is expected to end:

    step n     |==========================|
    plan n+1                        ^ LEAD before the end
    arrivals   ....... in n+1 ......|. in n+2

What an early plan hides is the host's part, about a millisecond. Of a long step that is nothing: it is waited for.
"""

from __future__ import annotations

from collections import deque

from engine.messages import Step, StepDone

LEAD_SECONDS = 0.003
LEAD_SHARE = 0.2  # of the step, where that is more: long steps vary by more than milliseconds
LONG_SECONDS = 0.15  # of such a step the host's part is less than a hundredth
MEMORY = 4  # steps of a kind that the expectation looks back on: their shortest


class Pace:
    """Expects a step's end from the last ones of its kind. `holds` False: every step may be planned at once."""

    def __init__(self, window: int, holds: bool) -> None:
        self._window, self._holds = window, holds
        self._flights: deque[tuple[int, bool, int]] = deque()  # id, whether all are decodes, tokens
        self._decodes: deque[float] = deque(maxlen=MEMORY)  # seconds of a step
        self._prefills: deque[float] = deque(maxlen=MEMORY)  # seconds of a token
        self._began = 0.0

    def sent(self, step: Step, now: float) -> None:
        """A step is on its way to the runner."""
        if not self._flights:
            self._began = now
        lengths = [chunk.length for chunk in step.chunks]
        self._flights.append((step.id, max(lengths, default=0) <= 1, sum(lengths)))

    def done(self, done: StepDone, now: float) -> None:
        """A step has ended, and the one behind it has begun."""
        while self._flights and self._flights[0][0] <= done.id:
            number, decodes, tokens = self._flights.popleft()
            if number == done.id and tokens:
                (self._decodes if decodes else self._prefills).append(done.seconds / (1 if decodes else tokens))
        self._began = now

    @property
    def due(self) -> float:
        """The time from which one more step may be planned; infinite where only a step's end can allow it."""
        if len(self._flights) >= self._window:
            return float("inf")
        if not self._flights or not self._holds:
            return float("-inf")
        _, decodes, tokens = self._flights[0]
        known = self._decodes if decodes else self._prefills
        expected = min(known, default=0.0) * (min(tokens, 1) if decodes else tokens)  # without tokens: fills only
        if expected > LONG_SECONDS:
            return float("inf")
        return self._began + expected - max(LEAD_SECONDS, LEAD_SHARE * expected)
