"""What became of every request, and how long tokens took. Knows nothing of how they were served.

arrived ----- admitted ----- first token - - - - last token = ended
   |--- TTFT ---------------------|--- gaps (ITL) ---|
   |--- e2e ----------------------------------------|
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import exp, log

from engine.messages import Update
from scheduler.simulate.trace import Ask

FINEST = 1e-6
STEPS = 100  # buckets for each factor of e: a percentile of gaps is right to 1%


class Gaps:
    """Times between tokens, counted in buckets."""

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}
        self.count = 0
        self.longest = 0.0

    def add(self, seconds: float) -> None:
        """One more."""
        bucket = int(STEPS * log(seconds / FINEST)) if seconds > FINEST else 0
        self._counts[bucket] = self._counts.get(bucket, 0) + 1
        self.count += 1
        self.longest = max(self.longest, seconds)

    def merge(self, other: Gaps) -> None:
        """All of another's too."""
        for bucket, count in other._counts.items():
            self._counts[bucket] = self._counts.get(bucket, 0) + count
        self.count += other.count
        self.longest = max(self.longest, other.longest)

    def percentile(self, percent: float) -> float:
        """Seconds; 0 when there are none."""
        rank = percent / 100 * self.count
        seen = 0
        for bucket, count in sorted(self._counts.items()):
            seen += count
            if seen >= rank:
                return min(self.longest, FINEST * exp((bucket + 1) / STEPS))
        return self.longest


@dataclass(slots=True)
class Journey:
    """One request from arrival to end; times are None until they come."""

    number: int
    ask: Ask
    arrived: float
    replica: int = 0
    admitted: float | None = None
    first: float | None = None
    last: float | None = None
    ended: float | None = None
    tokens: int = 0
    cached: int = 0
    error: str | None = None

    @property
    def ttft(self) -> float:
        assert self.first is not None
        return self.first - self.arrived

    @property
    def e2e(self) -> float:
        assert self.ended is not None
        return self.ended - self.arrived

    @property
    def served(self) -> bool:
        """Whether it ended well."""
        return self.ended is not None and self.error is None


class Journal:
    """All requests by number, and the gaps between their tokens."""

    def __init__(self) -> None:
        self.journeys: dict[int, Journey] = {}
        self.gaps = Gaps()

    def arrive(self, number: int, ask: Ask, now: float, replica: int) -> None:
        """It was sent to a replica."""
        self.journeys[number] = Journey(number, ask, now, replica)

    def admit(self, number: int, now: float) -> None:
        """It has a row for the first time, or again."""
        journey = self.journeys[number]
        if journey.admitted is None:
            journey.admitted = now

    def hear(self, update: Update, now: float) -> bool:
        """News of it; true when that was the last."""
        journey = self.journeys[update.request_id]
        assert journey.ended is None, f"request {journey.number} goes on after its end"
        assert update.index == journey.tokens, (
            f"request {journey.number} has {journey.tokens} tokens, not {update.index}"
        )
        journey.cached = max(journey.cached, update.cached_tokens)
        if update.tokens:
            journey.tokens += len(update.tokens)
            if journey.last is None:
                journey.first = now
            else:
                self.gaps.add(now - journey.last)
            journey.last = now
        if update.finish is None and update.error is None:
            return False
        journey.ended, journey.error = now, update.error
        return True


def passed(journeys: Iterable[Journey]) -> dict[int, float]:
    """By request, for how long it waited after a later one of its replica was let in; 0 for who was not passed.

    Nobody is passed for another reason than adapters, since who lacks pages or a row is not; but once it was passed,
    what it waits for rows and pages counts as well.
    """
    found: dict[int, float] = {}
    by_replica: dict[int, list[Journey]] = {}
    for journey in journeys:
        if journey.admitted is not None:
            by_replica.setdefault(journey.replica, []).append(journey)
    for group in by_replica.values():
        earliest = float("inf")  # admission of any that came later
        for journey in sorted(group, key=lambda j: (j.arrived, j.number), reverse=True):
            assert journey.admitted is not None
            found[journey.number] = max(0.0, journey.admitted - earliest)
            earliest = min(earliest, journey.admitted)
    return found
