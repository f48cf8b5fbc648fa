"""The order of requests: first come, first served within a priority. Knows nothing of rows, pages or lanes.

This is the seam for other schedule policies. A request gets its order once, on arrival, and keeps it when it is
preempted. All other decisions (lanes, rank pages, memory) only compare two orders.
"""

from __future__ import annotations

from typing import Literal

from engine.messages import Generate
from scheduler.requests.request import Request
from scheduler.types import Order

SchedulePolicy = Literal["fcfs", "priority", "fair"]


class Ordering:
    """First come, first served: (-is_suspect, priority, arrival)."""

    length = 3  # fields of an order on arrival; `order_behind` adds one

    def order_on_arrival(self, message: Generate, arrival: int) -> Order:
        """The order of a request that arrives now; `arrival` counts up, so no two orders are equal."""
        return 0, message.priority, arrival

    def order_without_request(self, arrival: int, priority: int = 0) -> Order:
        """The order of a fill that is wanted now though no request waits for it."""
        return 0, priority, arrival

    def order_behind(self, request: Request, frontier: Order | None, number: int) -> Order:
        """An order right behind the frontier, but not before the request's own, and in its priority.

        1  2  3  4  5 | 6  7         5 is the frontier: the request at 2 goes between 5 and 6; `number` counts up
        """
        if frontier is None or frontier[: self.length] < request.order[: self.length]:
            return request.order
        if frontier[1] > request.priority:
            return self.order_without_request(number, request.priority)
        return *frontier[: self.length], number

    def on_admitted(self, request: Request) -> None:
        """The request got a row, for the first time or again."""

    def on_transfer(self, request: Request, size: int) -> None:
        """So many bytes of an adapter are loaded or filled because the request waits for them."""

    def on_end(self, request: Request) -> None:
        """The request ended, or was refused on arrival."""


def with_suspicion(order: Order, is_suspect: bool) -> Order:
    """The same order before all other requests, or among them again."""
    return -is_suspect, *order[1:]
