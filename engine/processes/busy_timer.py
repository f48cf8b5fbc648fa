"""How long a process has been at one piece of work, so that its parent can tell a busy process from a stuck one."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator


class BusyTimer:
    """Restarted by the thread that works, read by the thread that sends heartbeats."""

    def __init__(self) -> None:
        self._since: float | None = None

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """The body is one piece of work."""
        self.tick()
        try:
            yield
        finally:
            self.idle()

    def tick(self) -> None:
        """The former piece of work is done and the next one begins now."""
        self._since = time.monotonic()

    def idle(self) -> None:
        """There is no work at the moment."""
        self._since = None

    @property
    def busy(self) -> float:
        """Seconds since the last `tick`; 0 when idle."""
        since = self._since
        return 0.0 if since is None else time.monotonic() - since
