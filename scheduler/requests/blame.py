"""Which request ended the model runner: the rule alone. Knows nothing of queues, steps or tokens.

A request that was in a step when the runner died has a point: the position up to which it had been planned. It is past
its point once a chunk that begins there is answered, and then nothing is held against it any more.

    the runner failed   every request in flight becomes a suspect. A step carries one suspect and no other request,
                        until it is past its point. A request that is alone in flight when the runner fails again is to
                        blame.
    the runner was      a coincidence (perhaps the system's out-of-memory killer): only a request that was in flight
    killed              twice without getting past its point becomes a suspect. It is to blame after three more kills
                        while it is alone, each at the same position.

So each request that ends the runner costs two deaths, or five, and each further one of its kind one, or three.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

COINCIDENCES = 1  # kills that make no suspect
MOST_ALONE = 3  # kills while a suspect is alone at one position that prove it to blame


class InFlightPosition(NamedTuple):
    """How far a request in flight was answered, and how far it was planned."""

    reached: int
    point: int


@dataclass(slots=True)
class _Suspicion:
    """What is held against one request."""

    point: int
    is_suspect: bool = False
    kills: int = 0  # that it was in flight at
    alone: int = 0  # kills in a row while it was alone at position `reached`
    reached: int = -1


class BlameTracker:
    """The requests, by id, that were in flight when a runner died and are not past their points; iterates suspects."""

    def __init__(self) -> None:
        self._suspicions: dict[int, _Suspicion] = {}
        self._suspects: dict[int, None] = {}

    def __len__(self) -> int:
        return len(self._suspects)

    def __iter__(self) -> Iterator[int]:
        return iter(self._suspects)

    def __contains__(self, request_id: int) -> bool:
        return request_id in self._suspects

    @property
    def is_empty(self) -> bool:
        """Whether nothing is held against any request."""
        return not self._suspicions

    def runner_died(self, in_flight: Mapping[int, InFlightPosition], own_fault: bool) -> int | None:
        """A runner died with these requests in flight. Returns the one to blame, if that is proved."""
        only = next(iter(in_flight)) if len(in_flight) == 1 else None
        if only is not None and only in self and self._is_proved(self._suspicions[only], in_flight[only], own_fault):
            return only
        for request_id, position in in_flight.items():
            suspicion = self._suspicions.setdefault(request_id, _Suspicion(position.point))
            suspicion.point = max(suspicion.point, position.point)
            suspicion.kills += not own_fault
            if own_fault or suspicion.kills > COINCIDENCES:
                self.add_suspect(request_id)
        return None

    def add_suspect(self, request_id: int) -> None:
        """The request is to run alone until it is past its point, or without one until any chunk is answered."""
        suspicion = self._suspicions.setdefault(request_id, _Suspicion(0))
        suspicion.is_suspect = True
        self._suspects[request_id] = None

    def chunk_answered(self, request_id: int, start: int) -> bool:
        """A chunk that begins at `start` was answered. Returns whether the request is a suspect no more."""
        suspicion = self._suspicions.get(request_id)
        if suspicion is None or start < suspicion.point:
            return False
        self.forget(request_id)
        return suspicion.is_suspect

    def forget(self, request_id: int) -> None:
        """The request has ended, or is past its point."""
        self._suspicions.pop(request_id, None)
        self._suspects.pop(request_id, None)

    @staticmethod
    def _is_proved(suspicion: _Suspicion, position: InFlightPosition, own_fault: bool) -> bool:
        if own_fault:
            return True
        suspicion.alone = suspicion.alone + 1 if suspicion.reached == position.reached else 1
        suspicion.reached = position.reached
        return suspicion.alone >= MOST_ALONE
