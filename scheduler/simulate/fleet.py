"""Replicas side by side, a router before them, and requests by the clock or as fast as they are served.

    open    every request at its time
    closed  a fixed number in flight, the next one in order as soon as one ends: what the machines can do at most

Time is one for all: whatever is due first happens first, wherever.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from zlib import crc32

from scheduler.simulate.replica import Replica
from scheduler.simulate.results.journal import Journal
from scheduler.simulate.trace import Ask

ROUTERS = ("hash", "two", "least")


class Router:
    """Which replica a request goes to.

    hash    every adapter has its home, by its name
    two     every adapter has two homes; the less loaded one
    least   the least loaded of all
    Requests for the base go to the least loaded.
    """

    def __init__(self, replicas: Sequence[Replica], kind: str) -> None:
        assert kind in ROUTERS
        self._replicas, self._kind = replicas, kind
        self._homes: dict[str, Sequence[Replica]] = {}

    def homes(self, adapter: str) -> Sequence[Replica]:
        """Where the adapter's requests may go."""
        if self._kind == "least" or len(self._replicas) == 1:
            return self._replicas
        count = 2 if self._kind == "two" else 1
        order = sorted(self._replicas, key=lambda replica: crc32(f"{replica.number} {adapter}".encode()))
        return order[:count]

    def choose(self, ask: Ask) -> Replica:
        """The one for this request."""
        homes = self._replicas if ask.adapter is None else self._home_of(ask.adapter)
        return homes[0] if len(homes) == 1 else min(homes, key=lambda replica: (replica.open, replica.number))

    def _home_of(self, adapter: str) -> Sequence[Replica]:
        homes = self._homes.get(adapter)
        if homes is None:
            homes = self._homes[adapter] = self.homes(adapter)
        return homes


class Fleet:
    """Replicas of one configuration; `tell` hears how many requests ended."""

    def __init__(
        self, replicas: Sequence[Replica], router: str, journal: Journal, tell: Callable[[int], object] = lambda n: None
    ) -> None:
        self.replicas, self.journal = replicas, journal
        self.router = Router(replicas, router)
        self._tell = tell
        self.now = 0.0

    def warm_up(self, adapters: Sequence[str]) -> None:
        """Every replica begins with the adapters whose home it is, the busiest last."""
        mine: dict[int, list[str]] = {}
        for name in adapters:
            for replica in self.router.homes(name):
                mine.setdefault(replica.number, []).append(name)
        for replica in self.replicas:
            replica.warm_up(mine.get(replica.number, []))

    def run_open(self, asks: Sequence[Ask]) -> None:
        """Every request at its time, to the last one's end."""
        for number, ask in enumerate(asks):
            self._until(ask.at)
            self.now = ask.at
            self.router.choose(ask).submit(number, ask, ask.at)
        self._until(float("inf"))

    def run_closed(self, asks: Sequence[Ask], concurrency: int) -> float:
        """Served requests a second while `concurrency` were in flight, all but the first and the last of them."""
        for number, ask in enumerate(asks[:concurrency]):
            self.router.choose(ask).submit(number, ask, 0.0)
        number, ended = min(concurrency, len(asks)), 0
        marks: list[tuple[float, int]] = []
        while (replica := self._soonest()).next_event < float("inf"):
            self.now = max(self.now, replica.next_event)
            count = replica.advance()
            self._tell(count)
            ended += count
            if count and ended >= concurrency and number < len(asks):
                marks.append((self.now, ended))
            for ask in asks[number : number + count]:
                self.router.choose(ask).submit(number, ask, self.now)
                number += 1
        if len(marks) < 2:
            return len(asks) / self.now
        (began, first), (last, count) = marks[0], marks[-1]
        return (count - first) / (last - began)

    def _until(self, when: float) -> None:
        while (replica := self._soonest()).next_event <= when:
            if replica.next_event == float("inf"):
                return
            self.now = max(self.now, replica.next_event)
            self._tell(replica.advance())

    def _soonest(self) -> Replica:
        if len(self.replicas) == 1:
            return self.replicas[0]
        return min(self.replicas, key=_next_event)


def _next_event(replica: Replica) -> float:
    return replica.next_event
