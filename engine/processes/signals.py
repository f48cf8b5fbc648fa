"""The signals that ask a program to stop. The launcher obeys them, its children leave them to it.

    SIGTERM, SIGINT, SIGHUP --> launcher --> StopRequests --> "stop" to each child, in order, over its stdin
                            --> children     ignored

Such a signal often reaches all processes at once: from a terminal, or from systemd's KillMode=control-group. A runner
that obeyed it would end under the streams that the launcher lets finish.
"""

from __future__ import annotations

import contextlib
import ctypes
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_PR_SET_PDEATHSIG = 1


class Stopped(BaseException):
    """Raised by a stop signal in the body of `StopRequests.interrupting`."""


@contextlib.contextmanager
def blocked() -> Iterator[None]:
    """Blocks the stop signals in this thread. A process that it starts has them blocked until it ignores them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore() -> None:
    """Ignores the stop signals, in this process and in those that it starts."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def end_with_parent() -> None:
    """Has the kernel kill this process when the thread that started it ends, even while it is stopped. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)


class StopRequests:
    """Counts the requests to stop this process, from its first line to its last.

    They are only counted, except while `interrupting` or `calling` is entered.
    """

    def __init__(self) -> None:
        self.count = 0
        self._call: Callable[[], object] | None = None
        self._interrupting = False

    def listen(self) -> None:
        """Counts the stop signals, but for a SIGHUP that the caller has this process ignore, as nohup does."""
        for number in STOP_SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._handle)

    def listen_for(self, number: signal.Signals) -> None:
        """Counts this signal instead of the stop signals, which a child process ignores."""
        signal.signal(number, self._handle)

    @contextlib.contextmanager
    def interrupting(self) -> Iterator[None]:
        """Raises Stopped in the body as soon as there is a request. For long calls that cannot be asked to stop."""
        self._interrupting = True
        try:
            if self.count:
                raise Stopped
            yield
        finally:
            self._interrupting = False

    @contextlib.contextmanager
    def calling(self, call: Callable[[], object]) -> Iterator[None]:
        """Calls `call`, in the main thread, for each request, and at once if there was one already."""
        self._call = call
        try:
            if self.count:
                call()
            yield
        finally:
            self._call = None

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        self.count += 1
        if self._interrupting:
            self._interrupting = False  # raised once: what cleans up after it is not interrupted
            raise Stopped
        if self._call is not None:
            self._call()


def interrupt_main_thread(number: signal.Signals) -> None:
    """Sends this process a signal that also ends a wait of its main thread."""
    ident = threading.main_thread().ident
    assert ident is not None, "the main thread runs"
    signal.pthread_kill(ident, number)
