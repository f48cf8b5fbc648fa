"""How long a process has been at its present piece of work: what tells a busy process from a stuck one."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator


class BusyTimer:
    """Written by the thread that works, read by the one that reports."""

    def __init__(self) -> None:
        self._since: float | None = None

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """One piece of work is being done while this is entered."""
        self.tick()
        try:
            yield
        finally:
            self.idle()

    def tick(self) -> None:
        """A piece of work begins now, and the one before it is over."""
        self._since = time.monotonic()

    def idle(self) -> None:
        """Nothing is to be done."""
        self._since = None

    @property
    def busy(self) -> float:
        """Seconds since the present piece of work began; 0 between two."""
        since = self._since
        return 0.0 if since is None else time.monotonic() - since
