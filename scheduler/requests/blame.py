"""The rule that decides which request ended the model runner. Does not depend on queues or steps.

When the runner dies, each request in flight gets a point: the position up to which it had been planned. The request is
past its point once the result of a chunk that begins there, or later, has arrived; its suspicion is then removed.

    the runner failed   Every request in flight becomes a suspect. A step with a suspect contains no other request until
                        the suspect is past its point. If the runner fails again while a suspect is the only request in
                        flight, that request is to blame.
    the runner was      Perhaps a coincidence, such as the system's out-of-memory killer. Only a request that was in
    killed              flight at two kills without getting past its point becomes a suspect. It is to blame after three
                        more kills while it is the only request in flight, each at the same position.

Finding one request that ends the runner costs two failures or five kills; each further request that is already a
suspect costs one failure or three kills.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

COINCIDENCES = 1  # kills that a request may be in flight at without becoming a suspect
MOST_ALONE = 3  # kills at one position that prove a suspect to blame, if it is the only request in flight


class InFlightPosition(NamedTuple):
    """A request in flight: results have arrived up to position `reached`, and steps were planned up to `point`."""

    reached: int
    point: int


@dataclass(slots=True)
class _Suspicion:
    """The point of one request that was in flight when a runner died, and the kills that count against it."""

    point: int
    is_suspect: bool = False
    kills: int = 0  # kills of the runner while the request was in flight
    alone: int = 0  # consecutive kills while it was the only request in flight, at position `reached`
    reached: int = -1


class BlameTracker:
    """The suspicions against requests, by request id. Its length, iteration and `in` cover the suspects only."""

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
        """Whether there is no suspicion against any request."""
        return not self._suspicions

    def runner_died(self, in_flight: Mapping[int, InFlightPosition], own_fault: bool) -> int | None:
        """Records that a runner died with these requests in flight. Returns the request to blame if one is proved.

        `own_fault`: the runner failed; otherwise it was killed.
        """
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
        """Makes the request a suspect until it is past its point; without a point, until the result of any chunk."""
        suspicion = self._suspicions.setdefault(request_id, _Suspicion(0))
        suspicion.is_suspect = True
        self._suspects[request_id] = None

    def chunk_answered(self, request_id: int, start: int) -> bool:
        """Records the result of a chunk that begins at `start`. Returns whether the request stops being a suspect."""
        suspicion = self._suspicions.get(request_id)
        if suspicion is None or start < suspicion.point:
            return False
        self.forget(request_id)
        return suspicion.is_suspect

    def forget(self, request_id: int) -> None:
        """Removes the suspicion against a request that has ended or is past its point."""
        self._suspicions.pop(request_id, None)
        self._suspects.pop(request_id, None)

    @staticmethod
    def _is_proved(suspicion: _Suspicion, position: InFlightPosition, own_fault: bool) -> bool:
        if own_fault:
            return True
        suspicion.alone = suspicion.alone + 1 if suspicion.reached == position.reached else 1
        suspicion.reached = position.reached
        return suspicion.alone >= MOST_ALONE
