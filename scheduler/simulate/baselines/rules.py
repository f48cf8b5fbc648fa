"""Two admission rules for a queue that is walked in order. Knows no tiers, rows or pages.

skip    vLLM's: a request whose adapter finds no free lane is skipped, for as long as that lasts
drain   SGLang's: the same, and when an adapter has starved for `threshold` seconds while all lanes are taken, the
        running adapter that ends soonest admits only requests that end about as soon as it does, until it has ended

Both are written from their published behaviour. A free lane goes to the first request in the queue.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

TOLERANCE = 1.2


class Waiter(Protocol):
    """A waiting request: its adapter (0: the base), its arrival, and the tokens that it may still generate."""

    @property
    def adapter(self) -> int: ...

    @property
    def arrived(self) -> float: ...

    @property
    def remaining(self) -> int: ...


class SkipAhead:
    """Skips requests whose adapter finds no lane."""

    def begin(self, waiting: Sequence[Waiter], running: Mapping[int, int], full: bool, now: float) -> None:
        """A step is being planned. `full`: no lane is free.

        `running`: by running adapter, the most tokens that one of its requests may still generate.
        """

    def permits(self, waiter: Waiter, lanes: Mapping[int, int] | set[int], cap: int) -> bool:
        """Whether a request may be admitted beside the adapters in `lanes`."""
        return waiter.adapter == 0 or waiter.adapter in lanes or len(lanes) < cap


class DrainStarving(SkipAhead):
    """Skips ahead, and drains running adapters for starving ones."""

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
