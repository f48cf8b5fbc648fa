"""The child's side of a child process: reads its config, reports Ready or Failed, ends when the parent is gone.

parent                                child
  | -- config, one JSON line on stdin -->|   stdin then stays open: EOF means that the parent is gone
  |<-- Heartbeat, each second -----------|   while it starts; JSON lines on the real stdout, which print()
  |<-- Ready or Failed, once ------------|   does not reach
  |<-- Heartbeat, each second -----------|   while it serves
  |<-- logs on stderr -------------------|
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import BinaryIO, TypeVar

import msgspec

from engine.errors import ConfigError, EngineError
from engine.processes.busy_timer import BusyTimer

HEARTBEAT_SECONDS = 1.0

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
    """Report that the child is alive. `busy`: seconds for which it has been at its current piece of work."""

    busy: float = 0.0


class Child:
    """The connection of this process to its parent. Create it before any print or heavy import."""

    def __init__(self, on_orphaned: Callable[[], None] = lambda: os._exit(0)) -> None:
        self._on_orphaned = on_orphaned
        self._parent = os.getppid()
        self._stdin: BinaryIO = sys.stdin.buffer
        self._report: BinaryIO = os.fdopen(os.dup(1), "wb")
        self._stop_heartbeat = threading.Event()
        os.dup2(2, 1)  # print() writes to the log from here on
        signal.signal(
            signal.SIGINT, signal.SIG_IGN
        )  # Ctrl-C reaches the launcher too, which stops its children in order

    def config(self, type_: type[C]) -> C:
        """Reads the config line. From then on EOF on stdin, or a new parent process, ends this process.

        Raises ConfigError if the line does not decode to `type_`.
        """
        line = self._stdin.readline()
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
                self._send(Heartbeat(busy_timer.busy))
                stop.wait(HEARTBEAT_SECONDS)

    def _send(self, report: Ready | Failed | Heartbeat) -> None:
        self._report.write(msgspec.json.encode(report) + b"\n")
        self._report.flush()

    def _watch_stdin(self) -> None:
        while os.read(self._stdin.fileno(), 4096):
            pass
        self._on_orphaned()

    def _watch_parent(self) -> None:
        while os.getppid() == self._parent:
            time.sleep(1.0)
        self._on_orphaned()
