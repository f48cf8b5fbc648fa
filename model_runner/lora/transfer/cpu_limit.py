"""A bound on processor time, for work whose length a stranger decides: regular expressions of an adapter's config.

The interpreter's own matcher looks for signals while it works, so a timer that counts this process's processor time can
end it. Only the main thread hears signals: elsewhere nothing is bounded. Knows nothing of adapters.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from engine.errors import AdapterError

SECONDS = 10.0
"""A survey of a deep model's adapter takes a fraction of one."""


@contextlib.contextmanager
def bounded(what: str) -> Iterator[None]:
    """Raises AdapterError in the body when it has taken SECONDS of processor time."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    seconds = SECONDS

    def ring(number: int, frame: FrameType | None) -> None:
        raise AdapterError(f"{what} takes more than {seconds:g} seconds of processor time")

    former = signal.signal(signal.SIGVTALRM, ring)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, former)
