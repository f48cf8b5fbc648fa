"""Two admission rules for a queue that is walked in order. Does not depend on tiers, rows or pages.

skip    vLLM's rule: a request whose adapter finds no free lane is skipped as long as no lane is free
drain   SGLang's rule: like skip, but when an adapter has starved for `threshold` seconds while all lanes are taken, the
        running adapter that ends soonest is drained: only its requests that end about as soon are still admitted

Both are written from the published behaviour of these engines. A free lane goes to the first request in the queue.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

TOLERANCE = 1.2  # a draining adapter admits requests up to this many times as long as the rest of its longest request


class Waiter(Protocol):
    """A waiting request: its adapter (0: the base), its time of arrival, and the tokens that it may still generate."""

    @property
    def adapter(self) -> int: ...

    @property
    def arrived(self) -> float: ...

    @property
    def remaining(self) -> int: ...


class SkipAhead:
    """The rule skip: skips requests whose adapter finds no free lane."""

    def begin(self, waiting: Sequence[Waiter], running: Mapping[int, int], full: bool, now: float) -> None:
        """Called before a step is planned. `full`: no lane is free.

        `running`: by running adapter, the most tokens that one of its requests may still generate.
        """

    def permits(self, waiter: Waiter, lanes: Mapping[int, int] | set[int], cap: int) -> bool:
        """Returns whether a request may be admitted beside the adapters in `lanes`; at most `cap` adapters have one."""
        return waiter.adapter == 0 or waiter.adapter in lanes or len(lanes) < cap


class DrainStarving(SkipAhead):
    """The rule drain: skips ahead, and drains running adapters when other adapters starve."""

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self.draining: dict[int, int] = {}  # adapter: tokens until its last request ends

    def begin(self, waiting: Sequence[Waiter], running: Mapping[int, int], full: bool, now: float) -> None:
        self.draining = {adapter: running[adapter] for adapter in self.draining if adapter in running}
        if not full:
            return
        starving: dict[int, None] = {}
        for waiter in waiting:  # oldest first
            if now - waiter.arrived <= self.threshold:
                break
            if waiter.adapter and waiter.adapter not in running:
                starving[waiter.adapter] = None
        while len(self.draining) < min(len(starving), len(running)):
            left = [(tokens, adapter) for adapter, tokens in running.items() if adapter not in self.draining]
            tokens, adapter = min(left)
            self.draining[adapter] = tokens

    def permits(self, waiter: Waiter, lanes: Mapping[int, int] | set[int], cap: int) -> bool:
        left = self.draining.get(waiter.adapter)
        if left is not None and waiter.remaining > TOLERANCE * left:
            return False
        return super().permits(waiter, lanes, cap)
