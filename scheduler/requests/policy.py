"""The order of requests: who goes before whom. Knows nothing of rows, pages or lanes.

The seam for other policies: a request gets its place once, when it comes, and keeps it when it is taken back. Whatever
else decides (lanes, rank pages, memory) asks only which of two places is smaller.
"""

from __future__ import annotations

from typing import Literal

from engine.messages import Generate
from scheduler.requests.request import Request
from scheduler.types import Order

SchedulePolicy = Literal["fcfs", "priority", "fair"]


class Ordering:
    """First come, first served, within a priority."""

    length = 2  # of a place on arrival

    def place(self, message: Generate, arrival: int) -> Order:
        """The place of a request that comes now; `arrival` counts up, so no two places are equal."""
        return message.priority, arrival

    def unasked(self, arrival: int, priority: int = 0) -> Order:
        """The place of something that is wanted now, though no request comes for it."""
        return priority, arrival

    def behind(self, request: Request, frontier: Order | None, number: int) -> Order:
        """A place right behind the frontier, though not before its old one, and in its priority; `number` counts up.

        1  2  3  4  5 | 6  7         5 is the frontier: who was at 2 goes between 5 and 6
        """
        if frontier is None or frontier[: self.length] < request.order[: self.length]:
            return request.order
        if frontier[0] > request.priority:
            return self.unasked(number, request.priority)
        return *frontier[: self.length], number

    def admitted(self, request: Request) -> None:
        """It has a row, for the first time or again."""

    def moved(self, request: Request, size: int) -> None:
        """So many bytes of an adapter are read or filled because it waits for them."""

    def left(self, request: Request) -> None:
        """It ended, or was refused when it came."""
