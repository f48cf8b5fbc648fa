"""Replicas side by side behind a router, in an open or a closed loop.

    open    each request is sent at its time
    closed  a fixed number of requests is open, and the next one is sent as soon as one ends: measures the capacity

All replicas share one clock: the earliest event of any replica is run next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from zlib import crc32

from scheduler.simulate.replica import Replica
from scheduler.simulate.results.request_log import RequestLog
from scheduler.simulate.trace import TraceRequest

ROUTERS = ("hash", "two", "least")


class Router:
    """Chooses the replica of a request; for the base model always the one with the fewest open requests.

    hash    each adapter has one replica, chosen by the hash of its name
    two     each adapter has two replicas; the one with fewer open requests is chosen
    least   an adapter's requests go to any replica: the one with the fewest open requests is chosen
    """

    def __init__(self, replicas: Sequence[Replica], kind: str) -> None:
        assert kind in ROUTERS
        self._replicas, self._kind = replicas, kind
        self._homes: dict[str, Sequence[Replica]] = {}

    def homes(self, adapter: str) -> Sequence[Replica]:
        """Returns the replicas that the adapter's requests may go to."""
        if self._kind == "least" or len(self._replicas) == 1:
            return self._replicas
        count = 2 if self._kind == "two" else 1
        order = sorted(self._replicas, key=lambda replica: crc32(f"{replica.number} {adapter}".encode()))
        return order[:count]

    def choose(self, request: TraceRequest) -> Replica:
        """Returns the replica that gets this request."""
        homes = self._replicas if request.adapter is None else self._home_of(request.adapter)
        return homes[0] if len(homes) == 1 else min(homes, key=lambda replica: (replica.open_requests, replica.number))

    def _home_of(self, adapter: str) -> Sequence[Replica]:
        homes = self._homes.get(adapter)
        if homes is None:
            homes = self._homes[adapter] = self.homes(adapter)
        return homes


class Fleet:
    """Replicas of one configuration. `on_finished` is called with how many requests have ended since the last call."""

    def __init__(
        self,
        replicas: Sequence[Replica],
        router: str,
        log: RequestLog,
        on_finished: Callable[[int], object] = lambda n: None,
    ) -> None:
        self.replicas, self.log = replicas, log
        self.router = Router(replicas, router)
        self._on_finished = on_finished
        self.now = 0.0

    def warm_up(self, adapters: Sequence[str]) -> None:
        """Loads `adapters`, in order, into each replica that their requests may be routed to, before time 0."""
        names: dict[int, list[str]] = {}
        for name in adapters:
            for replica in self.router.homes(name):
                names.setdefault(replica.number, []).append(name)
        for replica in self.replicas:
            replica.warm_up(names.get(replica.number, []))

    def run_open(self, requests: Sequence[TraceRequest]) -> None:
        """Sends each request at its time, and runs until the last one has ended."""
        for number, request in enumerate(requests):
            self._run_until(request.at)
            self.now = request.at
            self.router.choose(request).submit(number, request, request.at)
        self._run_until(float("inf"))

    def run_closed(self, requests: Sequence[TraceRequest], concurrency: int) -> float:
        """Keeps `concurrency` requests open. Returns requests per second, without the phases of ramp-up and drain."""
        for number, request in enumerate(requests[:concurrency]):
            self.router.choose(request).submit(number, request, 0.0)
        number, ended = min(concurrency, len(requests)), 0
        marks: list[tuple[float, int]] = []
        while (replica := self._next_replica()).next_event < float("inf"):
            self.now = max(self.now, replica.next_event)
            count = replica.advance()
            self._on_finished(count)
            ended += count
            if count and ended >= concurrency and number < len(requests):
                marks.append((self.now, ended))
            for request in requests[number : number + count]:
                self.router.choose(request).submit(number, request, self.now)
                number += 1
        if len(marks) < 2:
            return len(requests) / self.now
        (began, first), (last, count) = marks[0], marks[-1]
        return (count - first) / (last - began)

    def _run_until(self, when: float) -> None:
        while (replica := self._next_replica()).next_event <= when:
            if replica.next_event == float("inf"):
                return
            self.now = max(self.now, replica.next_event)
            self._on_finished(replica.advance())

    def _next_replica(self) -> Replica:
        if len(self.replicas) == 1:
            return self.replicas[0]
        return min(self.replicas, key=_next_event)


def _next_event(replica: Replica) -> float:
    return replica.next_event
