"""The times of each request and the gaps between its tokens. Does not depend on schedulers or machines.

arrived ----- admitted ----- first token - - - - last token = ended
   |--- TTFT ---------------------|--- gaps (ITL) ---|
   |--- e2e ----------------------------------------|
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import exp, log

from engine.messages import Update
from scheduler.simulate.trace import TraceRequest

FINEST = 1e-6  # seconds: shorter gaps are counted in the first bucket
BUCKETS = 100  # buckets for each factor of e, so a percentile is right to 1%


class GapHistogram:
    """A histogram of times between tokens, in logarithmic buckets."""

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}
        self.count = 0
        self.longest = 0.0

    def add(self, seconds: float) -> None:
        """Counts one gap."""
        bucket = int(BUCKETS * log(seconds / FINEST)) if seconds > FINEST else 0
        self._counts[bucket] = self._counts.get(bucket, 0) + 1
        self.count += 1
        self.longest = max(self.longest, seconds)

    def merge(self, other: GapHistogram) -> None:
        """Adds all gaps of another histogram."""
        for bucket, count in other._counts.items():
            self._counts[bucket] = self._counts.get(bucket, 0) + count
        self.count += other.count
        self.longest = max(self.longest, other.longest)

    def percentile(self, percent: float) -> float:
        """Returns a percentile of the gaps in seconds; 0 without gaps."""
        rank = percent / 100 * self.count
        seen = 0
        for bucket, count in sorted(self._counts.items()):
            seen += count
            if seen >= rank:
                return min(self.longest, FINEST * exp((bucket + 1) / BUCKETS))
        return self.longest


@dataclass(slots=True)
class RequestTimeline:
    """The times of one request from arrival to end; a time is None until it is known."""

    number: int
    request: TraceRequest
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
        """Whether the request ended without an error."""
        return self.ended is not None and self.error is None


class RequestLog:
    """The timelines of all requests, by number, and the gaps between their tokens."""

    def __init__(self) -> None:
        self.timelines: dict[int, RequestTimeline] = {}
        self.gaps = GapHistogram()

    def record_arrival(self, number: int, request: TraceRequest, now: float, replica: int) -> None:
        """Records that a request was sent to a replica."""
        self.timelines[number] = RequestTimeline(number, request, now, replica)

    def record_admission(self, number: int, now: float) -> None:
        """Records that a request got a row. Only its first row counts."""
        timeline = self.timelines[number]
        if timeline.admitted is None:
            timeline.admitted = now

    def record_update(self, update: Update, now: float) -> bool:
        """Records an update of a request. Returns whether the request has ended."""
        timeline = self.timelines[update.request_id]
        assert timeline.ended is None, f"request {timeline.number} goes on after its end"
        assert update.index == timeline.tokens, (
            f"request {timeline.number} has {timeline.tokens} tokens, not {update.index}"
        )
        timeline.cached = max(timeline.cached, update.cached_tokens)
        if update.tokens:
            timeline.tokens += len(update.tokens)
            if timeline.last is None:
                timeline.first = now
            else:
                self.gaps.add(now - timeline.last)
            timeline.last = now
        if update.finish is None and update.error is None:
            return False
        timeline.ended, timeline.error = now, update.error
        return True


def passed(timelines: Iterable[RequestTimeline]) -> dict[int, float]:
    """Returns, by request number, how long each request waited after a later one of its replica was admitted, or 0.

    A request is first passed because of its adapter, not because pages or rows are lacking. But once it was passed, its
    wait for pages and a row counts as well.
    """
    found: dict[int, float] = {}
    by_replica: dict[int, list[RequestTimeline]] = {}
    for timeline in timelines:
        if timeline.admitted is not None:
            by_replica.setdefault(timeline.replica, []).append(timeline)
    for group in by_replica.values():
        earliest = float("inf")  # the earliest admission of any later arrival
        for timeline in sorted(group, key=lambda t: (t.arrived, t.number), reverse=True):
            assert timeline.admitted is not None
            found[timeline.number] = max(0.0, timeline.admitted - earliest)
            earliest = min(earliest, timeline.admitted)
    return found
