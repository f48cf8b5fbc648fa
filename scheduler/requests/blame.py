"""Which request ends its runner: the rule alone. Knows nothing of queues, steps or tokens.

A request that was in a step when the runner died has a point: how far it had been planned. It is past its point when a
chunk that begins there is answered; then nothing is held against it any more.

    by its own fault         who was in flight is suspect from now on. Steps carry one suspect and nobody else, until
                             it is past its point; whoever is in flight alone when the runner dies once more, ends it
    by somebody else's hand  (a kill, perhaps the system's for want of memory) a coincidence: suspect is only who was
                             in flight twice without getting past its point, and it ends the runner if that happens
                             three times more while it is alone, each time at the same place

So whatever one request does costs two deaths, or five, and each other one like it one or three more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

COINCIDENCES = 1  # deaths by somebody else's hand that make nobody suspect
MOST_ALONE = 3  # deaths by somebody else's hand that one may meet alone at the same place


class InFlightPosition(NamedTuple):
    """Where a request in flight stands: up to where it was answered, and up to where it was planned."""

    reached: int
    point: int


@dataclass(slots=True)
class _Trial:
    """What is held against one request. `alone`: how often it died alone at `reached`."""

    point: int
    suspect: bool = False
    met: int = 0
    alone: int = 0
    reached: int = -1


class BlameTracker:
    """Requests by id that were in flight when a runner died, until they are past their points."""

    def __init__(self) -> None:
        self._trials: dict[int, _Trial] = {}
        self._suspects: dict[int, None] = {}

    def __len__(self) -> int:
        return len(self._suspects)

    def __iter__(self) -> Iterator[int]:
        return iter(self._suspects)

    def __contains__(self, request_id: int) -> bool:
        return request_id in self._suspects

    def died(self, flying: Mapping[int, InFlightPosition], own_fault: bool) -> int | None:
        """A runner died while these were in flight. Returns the one that ended it, if that is certain."""
        only = next(iter(flying)) if len(flying) == 1 else None
        if only is not None and only in self and self._is_proved(self._trials[only], flying[only], own_fault):
            return only
        for request_id, stand in flying.items():
            trial = self._trials.setdefault(request_id, _Trial(stand.point))
            trial.point = max(trial.point, stand.point)
            trial.met += not own_fault
            if own_fault or trial.met > COINCIDENCES:
                self.suspect(request_id)
        return None

    def suspect(self, request_id: int) -> None:
        """It is to be alone, until it is past its point; any chunk will do if it has none."""
        trial = self._trials.setdefault(request_id, _Trial(0))
        trial.suspect = True
        self._suspects[request_id] = None

    def answered(self, request_id: int, start: int) -> bool:
        """A chunk from `start` on was answered; whether that ends a suspicion."""
        trial = self._trials.get(request_id)
        if trial is None or start < trial.point:
            return False
        self.forget(request_id)
        return trial.suspect

    @property
    def quiet(self) -> bool:
        """Whether nothing is held against anyone."""
        return not self._trials

    def forget(self, request_id: int) -> None:
        """It has ended, or got past its point."""
        self._trials.pop(request_id, None)
        self._suspects.pop(request_id, None)

    @staticmethod
    def _is_proved(trial: _Trial, stand: InFlightPosition, own_fault: bool) -> bool:
        if own_fault:
            return True
        trial.alone = trial.alone + 1 if trial.reached == stand.reached else 1
        trial.reached = stand.reached
        return trial.alone >= MOST_ALONE
