"""The running requests and their rows in the runner's tables. Does not depend on pages, lanes or steps.

Rows are numbered from 0 to `rows` - 1. A row's generation increases at each reuse, so that a late result of its former
request is not taken for one of the present request.
"""

from __future__ import annotations

from bisect import bisect_left, insort

from scheduler.requests.request import Request
from scheduler.types import Order


def _order(request: Request) -> Order:
    return request.order


class RunningRows:
    """The rows and the requests in them, sorted by order. `generations`: the rows' generations at a former runner."""

    def __init__(self, rows: int, generations: list[int] | None = None) -> None:
        self.rows = rows
        self.ordered: list[Request] = []
        self._free = list(range(rows - 1, -1, -1))
        known = generations or []
        self.generations = [known[row] if row < len(known) else 0 for row in range(rows)]

    def __len__(self) -> int:
        return len(self.ordered)

    @property
    def free(self) -> int:
        """The number of free rows."""
        return len(self._free)

    def add(self, request: Request) -> None:
        """Gives the request a row, in a new generation."""
        row = self._free.pop()
        self.generations[row] += 1
        request.row, request.generation = row, self.generations[row]
        insort(self.ordered, request, key=_order)

    def remove(self, request: Request) -> None:
        """Frees the request's row."""
        index = bisect_left(self.ordered, request.order, key=_order)
        assert self.ordered[index] is request, f"request {request.id} does not run"
        del self.ordered[index]
        self._free.append(request.row)

    def audit(self) -> None:
        """Asserts that each row is free or held by one request, and that the requests are sorted."""
        rows = [request.row for request in self.ordered]
        assert sorted(rows + self._free) == list(range(self.rows)), f"rows {rows} and free {self._free}"
        orders = [request.order for request in self.ordered]
        assert orders == sorted(set(orders)), "the running rows are out of order"
        for request in self.ordered:
            assert request.generation == self.generations[request.row], f"row {request.row} has another generation"
