"""The deadline of a call: --request-timeout seconds after its arrival."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

from engine.errors import TimedOut

_UNSENT = "It had not reached the scheduler"


class Deadline:
    """The time `seconds` after `arrived` (monotonic seconds; by default now). With `seconds` None there is no bound."""

    def __init__(self, seconds: float | None = None, arrived: float | None = None) -> None:
        self.arrived = time.monotonic() if arrived is None else arrived
        self._seconds = seconds

    @property
    def left(self) -> float | None:
        """The seconds that are left until the deadline, negative after it; None if there is no bound."""
        return None if self._seconds is None else self.arrived + self._seconds - time.monotonic()

    @contextlib.asynccontextmanager
    async def kept(self) -> AsyncIterator[None]:
        """Bounds the work before a request is sent: at the deadline, cancels the entered block and raises TimedOut."""
        left = self.left
        if left is not None and left <= 0:
            raise self.missed(_UNSENT)
        try:
            async with asyncio.timeout(left) as bound:
                yield
        except TimeoutError:
            if not bound.expired():
                raise
            raise self.missed(_UNSENT) from None

    def missed(self, progress: str) -> TimedOut:
        """Returns the error for a call that missed its deadline. `progress` is a sentence that says how far it came."""
        bound = f"the request was not done after {self._seconds:g} seconds (--request-timeout), and is ended"
        return TimedOut(f"{bound}. {progress}")
