"""Measures how long a process has been busy with one piece of work; after too long its parent treats it as stuck."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator


class BusyTimer:
    """A timer that is restarted by the thread that works and read by the thread that sends heartbeats."""

    def __init__(self) -> None:
        self._since: float | None = None
        self.begun = 0
        """The number of pieces of work begun so far, which shows progress even if each is short."""

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Counts the body of the `with` statement as one piece of work; the timer is idle afterwards."""
        self.tick()
        try:
            yield
        finally:
            self.idle()

    def tick(self) -> None:
        """Ends the current piece of work and begins the next one."""
        self._since = time.monotonic()
        self.begun += 1

    def idle(self) -> None:
        """Marks the process as having no work."""
        self._since = None

    @property
    def busy(self) -> float:
        """Seconds since the last `tick`; 0 when idle."""
        since = self._since
        return 0.0 if since is None else time.monotonic() - since
