"""The child's side of a child process: reads its config, reports Ready or Failed, ends on STOP or with its parent.

parent                                child
  | -- config, one JSON line on stdin -->|   stdin then stays open: EOF means that the parent is gone
  |<-- Heartbeat, each second -----------|   while it starts; JSON lines on the real stdout, which print()
  |<-- Ready or Failed, once ------------|   does not reach
  |<-- Heartbeat, each second -----------|   while it serves
  |<-- logs on stderr -------------------|
  | -- STOP, one line on stdin --------->|   ends in order; the stop signals are ignored
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from typing import BinaryIO, NoReturn, TypeVar

import msgspec

from engine import logs
from engine.errors import ConfigError, EngineError
from engine.processes import signals
from engine.processes.busy_timer import BusyTimer

HEARTBEAT_SECONDS = 1.0
STOP = b"stop\n"

C = TypeVar("C", bound=msgspec.Struct)


Facts = dict[str, str | int | float | bool | list[str] | None]


class Ready(msgspec.Struct, frozen=True, tag=True):
    """Report that the child serves. `facts` are values for the banner and for the embedding program."""

    facts: Facts = {}


class Failed(msgspec.Struct, frozen=True, tag=True):
    """Report that the child cannot serve. `message` is one line for people, `kind` the kind of the EngineError."""

    message: str
    kind: str = "server_error"


class Heartbeat(msgspec.Struct, frozen=True, tag=True):
    """Report that the child is alive. `busy`: seconds for which it has been at its current piece of work.

    A `busy` of 0 in a child that starts: it waits for another process. `begun`: pieces of work begun so far.
    """

    busy: float = 0.0
    begun: int = 0


def leave(status: int = 0) -> NoReturn:
    """Ends this process at once, from any thread. What it logged is still written, if that is quick."""
    logs.flush()
    os._exit(status)


class Child:
    """The connection of this process to its parent. Create it before any print or heavy import.

    `on_stop` is called, by a thread, when the parent asks this process to end; `on_orphaned` when the parent is gone.
    With `is_bound` the kernel also kills this process when the thread that started it ends.
    """

    def __init__(
        self,
        on_stop: Callable[[], object] = leave,
        on_orphaned: Callable[[], object] = leave,
        *,
        is_bound: bool = False,
    ) -> None:
        logs.open_descriptors()
        self.on_stop = on_stop
        self._on_orphaned = on_orphaned
        self._parent = os.getppid()
        if is_bound:
            signals.end_with_parent()
        signals.ignore()
        self._unread = b""  # of stdin
        self._report: BinaryIO = os.fdopen(os.dup(1), "wb")
        self._stop_heartbeat = threading.Event()
        os.dup2(2, 1)  # what is written to stdout goes to the log from here on
        logs.take_over(stdout=2)

    def config(self, type_: type[C]) -> C:
        """Reads the config line. From then on this process watches its stdin and its parent.

        Raises ConfigError if the line does not decode to `type_`.
        """
        line = self._read_line()
        if not line.endswith(b"\n"):  # the parent died while it wrote the line
            self._on_orphaned()
        try:
            config = msgspec.json.decode(line, type=type_)
        except msgspec.MsgspecError as error:
            raise ConfigError(f"bad {type_.__name__}: {error}") from error
        threading.Thread(target=self._watch_stdin, name="lifeline", daemon=True).start()
        threading.Thread(target=self._watch_parent, name="parent", daemon=True).start()
        return config

    def begin_startup(self) -> BusyTimer:
        """Sends heartbeats until `ready`. Call the timer's `tick` after each part of the startup."""
        busy_timer = BusyTimer()
        busy_timer.tick()
        self.start_heartbeat(busy_timer)
        return busy_timer

    def ready(self, facts: Facts | None = None) -> None:
        """Reports that this process serves, and ends the heartbeats of the startup."""
        self._stop_heartbeat.set()
        self._send(Ready(facts or {}))

    def failed(self, error: BaseException) -> None:
        """Reports why this process cannot serve. Call it once, then exit with a non-zero code."""
        if isinstance(error, EngineError):
            self._send(Failed(error.message, error.kind))
        else:
            self._send(Failed(f"{type(error).__name__}: {error}"))

    def start_heartbeat(self, busy_timer: BusyTimer) -> None:
        """Sends heartbeats with the timer's value from now on. Call it after `ready`."""
        self._stop_heartbeat = threading.Event()
        threading.Thread(
            target=self._send_heartbeats, args=(busy_timer, self._stop_heartbeat), name="heartbeat", daemon=True
        ).start()

    def _send_heartbeats(self, busy_timer: BusyTimer, stop: threading.Event) -> None:
        with contextlib.suppress(OSError):  # the parent closed the pipe
            while not stop.is_set():
                self._send(Heartbeat(busy_timer.busy, busy_timer.begun))
                stop.wait(HEARTBEAT_SECONDS)

    def _send(self, report: Ready | Failed | Heartbeat) -> None:
        self._report.write(msgspec.json.encode(report) + b"\n")
        self._report.flush()

    def _read_line(self) -> bytes:
        """Reads a line from stdin, or what is left before its end. Not buffered, so that a thread can read on."""
        while b"\n" not in self._unread and (data := os.read(0, 1 << 16)):
            self._unread += data
        line, newline, self._unread = self._unread.partition(b"\n")
        return line + newline

    def _watch_stdin(self) -> None:
        while line := self._read_line():
            if line == STOP:
                self.on_stop()
        self._on_orphaned()

    def _watch_parent(self) -> None:
        while os.getppid() == self._parent:
            time.sleep(1.0)
        self._on_orphaned()
