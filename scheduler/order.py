"""The order of requests: who goes before whom. Knows nothing of rows, pages or lanes.

The seam for other policies: a request gets its place once, when it comes, and keeps it when it is taken back. Whatever
else decides (lanes, rank pages, memory) asks only which of two places is smaller.
"""

from __future__ import annotations

from typing import Literal

from engine.messages import Generate
from scheduler.request import Order, Request

SchedulePolicy = Literal["fcfs", "priority", "fair"]


class Ordering:
    """First come, first served, within a priority."""

    def place(self, message: Generate, arrival: int) -> Order:
        """The place of a request that comes now; `arrival` counts up, so no two places are equal."""
        return message.priority, arrival

    def unasked(self, arrival: int) -> Order:
        """The place of something that is wanted now, of the usual priority, though no request waits for it."""
        return 0, arrival

    def admitted(self, request: Request) -> None:
        """It has a row, for the first time or again."""

    def moved(self, request: Request, size: int) -> None:
        """So many bytes of an adapter are read or filled because it waits for them."""

    def left(self, request: Request) -> None:
        """It ended, or was refused when it came."""
