"""The order of requests: first come, first served within a priority. Does not depend on rows, pages or lanes.

Other schedule policies subclass `Ordering`. A request gets its order once, on arrival, and keeps it when it is
preempted. All other decisions (lanes, rank pages, memory) only compare two orders.
"""

from __future__ import annotations

from typing import Literal

from engine.messages import Generate
from scheduler.requests.request import Request
from scheduler.types import Order

SchedulePolicy = Literal["fcfs", "priority", "fair"]


class Ordering:
    """First come, first served within a priority: orders are (-is_suspect, priority, arrival)."""

    length = 3  # number of fields of an order on arrival; `order_behind` may add one

    def order_on_arrival(self, message: Generate, arrival: int) -> Order:
        """Returns the order of a request that arrives now; `arrival` counts up, so no two orders are equal."""
        return 0, message.priority, arrival

    def order_without_request(self, arrival: int, priority: int = 0) -> Order:
        """Returns the order of a fill that is planned now though no request waits for it."""
        return 0, priority, arrival

    def order_behind(self, request: Request, frontier: Order | None, number: int) -> Order:
        """Returns an order right behind the frontier, but not before the request's own, and in its priority.

        1  2  3  4  5 | 6  7         5 is the frontier: the request at 2 goes between 5 and 6; `number` counts up
        """
        if frontier is None or frontier[: self.length] < request.order[: self.length]:
            return request.order
        if frontier[1] > request.priority:
            return self.order_without_request(number, request.priority)
        return *frontier[: self.length], number

    def on_admitted(self, request: Request) -> None:
        """Called when the request gets a row, for the first time or again."""

    def on_transfer(self, request: Request, size: int) -> None:
        """Called when `size` bytes of an adapter are loaded or filled because the request waits for them."""

    def on_end(self, request: Request) -> None:
        """Called when the request has ended, or was refused on arrival."""


def with_suspicion(order: Order, is_suspect: bool) -> Order:
    """Returns the order with its first field set: a suspect's comes before the orders of all other requests."""
    return -is_suspect, *order[1:]
