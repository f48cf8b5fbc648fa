"""The child's side of a process: config in, one Ready or Failed line out, and an end when the parent is gone.

    parent                                child
      | -- config, one JSON line on stdin -->|   stdin then stays open: its end means the parent is gone
      |<-- Heartbeat, each second ---------------|   on the real stdout, which stray prints can no longer reach
      |<-- Ready or Failed, one JSON line ---|   the same way
      |<-- Heartbeat, each second ---------------|   the same way, of one that serves
      |<-- logs on stderr -------------------|

Knows nothing of what the process does.
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
    """The child serves. `facts` is what a person would like to read."""

    facts: Facts = {}


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The child cannot serve; `message` is one line for people."""

    message: str
    kind: str = "server_error"


class Heartbeat(msgspec.Struct, frozen=True, tag=True):
    """The child's busy_timer. `busy`: for how many seconds it has been at its present piece of work."""

    busy: float = 0.0


class Child:
    """This process as its parent sees it. Make one before anything else can print or import a heavy library."""

    def __init__(self, on_orphaned: Callable[[], None] = lambda: os._exit(0)) -> None:
        self._on_orphaned = on_orphaned
        self._parent = os.getppid()
        self._stdin: BinaryIO = sys.stdin.buffer
        self._report: BinaryIO = os.fdopen(os.dup(1), "wb")
        self._quiet = threading.Event()
        os.dup2(2, 1)  # from here on a stray print lands in the log
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the launcher, which ends us in order

    def config(self, type_: type[C]) -> C:
        """Reads the config line, then watches the lifeline: the end of stdin, or a new parent, ends this process."""
        line = self._stdin.readline()
        if not line.endswith(b"\n"):  # the parent went in the middle of it
            self._on_orphaned()
        try:
            config = msgspec.json.decode(line, type=type_)
        except msgspec.MsgspecError as error:
            raise ConfigError(f"bad {type_.__name__}: {error}") from error
        threading.Thread(target=self._watch_stdin, name="lifeline", daemon=True).start()
        threading.Thread(target=self._watch_parent, name="parent", daemon=True).start()
        return config

    def begin_startup(self) -> BusyTimer:
        """The busy_timer of the start, which the parent hears until `ready`: tick it as the start goes on."""
        busy_timer = BusyTimer()
        busy_timer.tick()
        self.start_heartbeat(busy_timer)
        return busy_timer

    def ready(self, facts: Facts | None = None) -> None:
        """Reports that this process serves; ends the busy_timer of the start."""
        self._quiet.set()
        self._send(Ready(facts or {}))

    def failed(self, error: BaseException) -> None:
        """Reports why it cannot serve. Call it once, then exit non-zero."""
        if isinstance(error, EngineError):
            self._send(Failed(error.message, error.kind))
        else:
            self._send(Failed(f"{type(error).__name__}: {error}"))

    def start_heartbeat(self, busy_timer: BusyTimer) -> None:
        """From now on the parent hears each second that this process lives and how long its work takes; after ready."""
        self._quiet = threading.Event()
        threading.Thread(target=self._beat, args=(busy_timer, self._quiet), name="heartbeat", daemon=True).start()

    def _beat(self, busy_timer: BusyTimer, quiet: threading.Event) -> None:
        with contextlib.suppress(OSError):  # nobody listens any more
            while not quiet.is_set():
                self._send(Heartbeat(busy_timer.busy))
                quiet.wait(HEARTBEAT_SECONDS)

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
