"""How long waiting requests have been overtaken by later ones. Does not depend on the reason.

    order       1  2  3  4  5  6  7  8  9 ...
    admitted    x     x        x                  when 6 was admitted, 2, 4 and 5 had been overtaken; 7 had not
                               ^ the frontier

A request that was not admitted although there was a row and memory for it counts as overtaken too: the frontier is
moved behind it. Only the times at which the frontier moved are kept, not one per request: thousands of requests may
wait, and `passed_since` is called for few of them.
"""

from __future__ import annotations

from bisect import bisect_right

from scheduler.types import Order

MAX_MOVES = 4096  # moves of the frontier that are kept; then neighbours are merged, and the earlier time is kept


class StarvationTracker:
    """The frontier (the latest order that was admitted or skipped), and the times at which it moved."""

    def __init__(self) -> None:
        self._orders: list[Order] = []
        self._times: list[float] = []

    def __len__(self) -> int:
        """Returns the number of moves of the frontier that are kept."""
        return len(self._orders)

    def mark_passed(self, order: Order, now: float) -> None:
        """Moves the frontier to `order`: waiting requests before it are overtaken `now`, if not earlier."""
        if self._orders and order <= self._orders[-1]:
            return
        if self._times and self._times[-1] == now:
            self._orders[-1] = order
            return
        if len(self._orders) == MAX_MOVES:
            del self._orders[::2], self._times[1::2]  # a move takes its earlier neighbour's time
        self._orders.append(order)
        self._times.append(now)

    @property
    def frontier(self) -> Order | None:
        """The order before which all waiting requests were overtaken; None before the first move."""
        return self._orders[-1] if self._orders else None

    def passed_since(self, order: Order) -> float | None:
        """Returns when the waiting request at `order` was first overtaken; None if it was not."""
        index = bisect_right(self._orders, order)
        return self._times[index] if index < len(self._times) else None

    def forget_before(self, first: Order | None) -> None:
        """Forgets moves before `first`, the first waiting request; None: no request waits."""
        gone = len(self._orders) if first is None else bisect_right(self._orders, first)
        if gone:
            del self._orders[:gone], self._times[:gone]
