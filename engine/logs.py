"""Logging to stderr: one line for each record, with the name of the process. Writing never blocks and never raises.

log, print, traceback --> BoundedStream: at most MAX_PENDING bytes --> a thread --> descriptor 1 or 2
                             '--> more is dropped and counted          (may block, be full or be closed)
"""

from __future__ import annotations

import atexit
import contextlib
import io
import json
import logging
import os
import re
import select
import sys
import threading
import time
from collections import deque
from typing import TextIO, cast

MAX_VALUE_CHARS = 200
MAX_PENDING = 1 << 20
"""The most bytes that wait for a descriptor that takes none."""
MAX_LINE = 1 << 16
"""The most characters of an unfinished line that are kept back."""
FLUSH_SECONDS = 1.0
"""The longest wait, when a process ends, for the descriptors to take what was written."""

_PLAIN = re.compile(r"[\w./:,@+%*~-]+", re.ASCII)


def setup(process: str, level: str) -> None:
    """Configures the root logger of this process; `level` is debug, info, warning or error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname).1s {process}: %(message)s", "%H:%M:%S"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())


class BoundedStream(io.TextIOBase):
    """A text stream to a descriptor. A thread does the writing, so no call blocks, and none raises.

    While the descriptor takes nothing, MAX_PENDING bytes are kept. Further lines are dropped; a line that says how many
    follows once the descriptor takes bytes again. Lines that the descriptor refuses, as a full disk or a closed pipe
    does, count as dropped too. While no thread can be started, lines are kept, and `drain` writes them.
    """

    def __init__(self, descriptor: int, encoding: str = "utf-8") -> None:
        self._descriptor = descriptor
        self._encoding = encoding
        self._line = ""
        self._pending: deque[tuple[bytes, int]] = deque()  # with the number of lines; a note's are the dropped ones
        self._bytes = 0  # pending, or being written
        self._dropped = 0  # lines that no note counts yet
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """The encoding. Characters that it lacks are written as backslash escapes."""
        return self._encoding

    def fileno(self) -> int:
        """Returns the descriptor."""
        return self._descriptor

    def isatty(self) -> bool:
        """Returns whether the descriptor is a terminal."""
        return os.isatty(self._descriptor)

    def writable(self) -> bool:
        """Returns True."""
        return True

    def write(self, text: str) -> int:
        """Queues the lines of `text` that are complete; the rest waits for its end or for `flush`."""
        with self._changed:
            lines, newline, self._line = (self._line + text).rpartition("\n")
            self._queue(lines + newline)
            if len(self._line) > MAX_LINE:
                self.flush()
        return len(text)

    def flush(self) -> None:
        """Queues what is left of an unfinished line. Does not wait until it is written."""
        with self._changed:
            line, self._line = self._line, ""
            self._queue(line)

    def drain(self, seconds: float) -> bool:
        """Waits up to `seconds` until all that was queued is written or dropped. Returns whether that was reached."""
        self.flush()
        with self._changed:
            if self._thread is None:
                self._write_without_thread(seconds)
                return not self._bytes
            return self._changed.wait_for(lambda: not self._bytes, seconds)

    def _queue(self, text: str) -> None:
        data = text.encode(self._encoding, "backslashreplace")
        lines = max(1, data.count(b"\n"))
        if not data:
            return
        if self._bytes + len(data) > MAX_PENDING:
            self._dropped += lines
            return
        self._note_dropped()
        self._append(data, lines)

    def _note_dropped(self) -> None:
        if self._dropped:
            text = f"({self._dropped} lines were dropped here, as nothing took them)\n"
            self._append(text.encode(self._encoding), self._dropped)
            self._dropped = 0

    def _append(self, data: bytes, lines: int) -> None:
        self._pending.append((data, lines))
        self._bytes += len(data)
        if self._thread is None:
            thread = threading.Thread(target=self._write_pending, name="log", daemon=True)
            with contextlib.suppress(RuntimeError):  # too many threads, or the interpreter ends: the next line tries
                thread.start()
                self._thread = thread
        self._changed.notify_all()

    def _write_without_thread(self, seconds: float) -> None:
        """Writes what is pending for up to `seconds`, each time no more than a pipe takes without blocking."""
        until = time.monotonic() + seconds
        left = memoryview(b"".join(data for data, _ in self._pending))
        poll = select.poll()
        poll.register(self._descriptor, select.POLLOUT)
        with contextlib.suppress(OSError):
            while left and poll.poll(1000 * max(0.0, until - time.monotonic())):
                left = left[os.write(self._descriptor, left[: select.PIPE_BUF]) :]
        self._pending = deque([(bytes(left), bytes(left).count(b"\n"))] if left else [])
        self._bytes = len(left)

    def _write_pending(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pending)
                data, lines = self._pending.popleft()
            taken = _write(self._descriptor, data)
            with self._changed:
                self._bytes -= len(data)
                if not taken:
                    self._dropped += lines
                elif not self._pending:
                    self._note_dropped()
                self._changed.notify_all()


def open_descriptors() -> None:
    """Opens /dev/null as those of the descriptors 0 to 2 that are not open.

    Otherwise a file or socket gets their number and what is meant for stderr.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # open takes the lowest free number


def take_over(stdout: int = 1) -> None:
    """Makes sys.stdout and sys.stderr streams that never block, for the rest of this process.

    print() writes to the descriptor `stdout`: 1, or 2 for a process that uses its stdout otherwise.
    """
    encoding = getattr(sys.stderr, "encoding", None) or "utf-8"
    sys.stderr = cast(TextIO, BoundedStream(2, encoding))
    sys.stdout = sys.stderr if stdout == 2 else cast(TextIO, BoundedStream(stdout, encoding))
    atexit.register(flush)


def flush() -> None:
    """Waits up to FLUSH_SECONDS until the streams of `take_over` are written. Call it before os._exit."""
    deadline = time.monotonic() + FLUSH_SECONDS
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, BoundedStream):
            stream.drain(max(0.0, deadline - time.monotonic()))


def pairs(**values: object) -> str:
    """Returns `key=value key=value ...`, without the values that are None.

    A value that a client chose cannot break the line: long values are cut, and values that are not plain words are
    quoted as in JSON.
    """
    return " ".join(f"{key}={_shown(value)}" for key, value in values.items() if value is not None)


def _shown(value: object) -> str:
    text = f"{value:.3f}" if isinstance(value, float) else str(value)
    if len(text) > MAX_VALUE_CHARS:
        text = text[: MAX_VALUE_CHARS - 3] + "..."
    return text if _PLAIN.fullmatch(text) else json.dumps(text)


def _write(descriptor: int, data: bytes) -> bool:
    """Writes `data`, waiting as long as that takes. Returns False if the descriptor refuses it."""
    left = memoryview(data)
    while left:
        try:
            left = left[os.write(descriptor, left) :]
        except BlockingIOError:  # another process made the open file non-blocking
            poll = select.poll()
            poll.register(descriptor, select.POLLOUT)
            poll.poll(1000)
        except OSError:
            return False
    return True
