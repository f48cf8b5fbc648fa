"""A bound on processor time, for the regular expressions in an adapter's config, which may take very long to match.

Python's `re` checks for signals while it matches, so a timer on this process's processor time can interrupt it. Only
the main thread handles signals: in other threads nothing is bounded.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from engine.errors import AdapterError

SECONDS = 10.0
"""The processor time that is allowed. The survey of an adapter for a deep model takes a fraction of a second."""


@contextlib.contextmanager
def bounded(what: str) -> Iterator[None]:
    """Raises AdapterError in the `with` body once it has used SECONDS of processor time; `what` names the work."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    seconds = SECONDS

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise AdapterError(f"{what} takes more than {seconds:g} seconds of processor time")

    former = signal.signal(signal.SIGVTALRM, interrupt)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, former)
