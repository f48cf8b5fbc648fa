"""The parent's side of a child process: starts it, reads its reports, watches it from its first breath to its last.

What the parent tells from the reports, and when it kills the child, stands in engine.processes.vital_signs.
"""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import functools
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from engine.errors import EngineDead, error_from_wire
from engine.ipc import DECODE_ERRORS
from engine.processes import signals
from engine.processes.child import STOP, Failed, Heartbeat, Ready
from engine.processes.vital_signs import SERVING, STARTING, Limits, ProcessExit, VitalSigns

log = logging.getLogger(__name__)

_REPORT: msgspec.json.Decoder[Ready | Failed | Heartbeat] = msgspec.json.Decoder(Ready | Failed | Heartbeat)
_PACKAGE_ROOT = Path(__file__).resolve().parents[2]
MAX_REPORT_BYTES = 1 << 20
LAST_REPORT_SECONDS = 2.0
"""How long the report of a process that has ended may take to arrive: its stdout may be open elsewhere."""
KILL_SECONDS = 10.0
"""How long a killed process may take to end; longer if it hangs in a system call."""
EXTERNAL_EXIT_CODES = (0, -signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP)


@dataclass(frozen=True)
class ProcessSpec:
    """The command `python -P -m module arguments`, the config for its stdin, and the descriptors it inherits.

    `is_excused` says, once the process has ended, whether a request ended it that its successor knows and refuses.
    """

    name: str
    module: str
    config: msgspec.Struct
    arguments: Sequence[str] = ()
    descriptors: Sequence[int] = ()
    environment: dict[str, str] = field(default_factory=dict)
    is_excused: Callable[[], bool] = lambda: False


@functools.cache
def _python_path() -> str | None:
    """Returns the directory to add to a child's PYTHONPATH, or None if the child finds this same package without it."""
    probe = "import importlib.util as u; s = u.find_spec('engine'); print(s.origin if s else '')"
    found = subprocess.run([sys.executable, "-P", "-c", probe], capture_output=True, text=True, check=False, cwd="/")
    return None if found.stdout.strip() == str(_PACKAGE_ROOT / "engine" / "__init__.py") else str(_PACKAGE_ROOT)


def _environment(extra: dict[str, str]) -> dict[str, str]:
    utf8 = {"PYTHONUTF8": "1"} if codecs.lookup(sys.getfilesystemencoding()).name in ("ascii", "utf-8") else {}
    env = {**os.environ, "PYTHONSAFEPATH": "1", **utf8, **extra}
    root = _python_path()
    if root is not None:
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [root, env.get("PYTHONPATH")]))
    return env


class Process:
    """One incarnation of a child process. The code that starts it also stops it."""

    def __init__(self, spec: ProcessSpec, child: subprocess.Popen[bytes]) -> None:
        loop = asyncio.get_running_loop()
        self.spec = spec
        self._child = child
        self._signs = VitalSigns()
        self._ended: asyncio.Future[int] = loop.create_future()
        self._first_report: asyncio.Future[Ready | Failed] = loop.create_future()
        self._reports = _ReportReader(self._hear)
        self._stdin: asyncio.WriteTransport | None = None
        threading.Thread(target=_wait, args=(child, loop, self._ended), name="wait", daemon=True).start()

    @classmethod
    async def start(cls, spec: ProcessSpec) -> Process:
        """Starts the child and writes its config to its stdin. The child shares the parent's stderr.

        Raises OSError if it cannot be started.
        """
        child = _spawn(spec)
        process = cls(spec, child)
        try:
            await process._connect()
        except BaseException:
            process.kill()
            for pipe in (child.stdin, child.stdout):
                pipe.close()  # type: ignore[union-attr]
            raise
        return process

    async def _connect(self) -> None:
        loop = asyncio.get_running_loop()
        self._stdin, _ = await loop.connect_write_pipe(asyncio.BaseProtocol, self._child.stdin)
        await loop.connect_read_pipe(lambda: self._reports, self._child.stdout)
        self._stdin.write(msgspec.json.encode(self.spec.config) + b"\n")

    @property
    def pid(self) -> int:
        """The process id."""
        return self._child.pid

    @property
    def serves(self) -> bool:
        """Whether the child has reported Ready and has not ended."""
        reported = self._first_report.done() and isinstance(self._first_report.result(), Ready)
        return reported and not self._ended.done()

    async def report(self, limits: Limits = STARTING, others_serve: Callable[[], bool] = lambda: False) -> Ready:
        """Waits for the child's Ready and returns it. `others_serve`: whether all that it may wait for serves already.

        Raises the error that the child reports, or EngineDead if the child exits first or exceeds `limits`.
        """
        end = await self._watch(limits, self._first_report, others_serve)
        if end is not None:
            raise EngineDead(f"the {self.spec.name} process {end.description} before it was ready; its log is above")
        report = self._first_report.result()
        if isinstance(report, Failed):
            raise error_from_wire(report.kind, report.message, None, None)
        return report

    async def watch(self, limits: Limits = SERVING) -> ProcessExit:
        """Waits for the end of a child that serves. Kills the child if it exceeds `limits`."""
        end = await self._watch(limits)
        assert end is not None, "nothing else ends the watch"
        return end

    async def stop(self, grace: float) -> None:
        """Asks the child to end, and kills it if that takes more than `grace` seconds."""
        if self._stdin is not None and not self._stdin.is_closing():
            self._stdin.write(STOP)
            await asyncio.wait((self._ended,), timeout=grace)
        await self._end()

    def kill(self) -> None:
        """Sends SIGKILL."""
        with contextlib.suppress(ProcessLookupError):
            self._child.kill()

    async def _watch(
        self,
        limits: Limits,
        until: asyncio.Future[Ready | Failed] | None = None,
        others_serve: Callable[[], bool] = lambda: False,
    ) -> ProcessExit | None:
        """Waits for the end, which it returns, or until `until` is done. Kills the child if it exceeds `limits`."""
        events: list[asyncio.Future[int] | asyncio.Future[Ready | Failed]] = [self._ended]
        if until is not None:
            events.append(until)
        while True:
            done, _ = await asyncio.wait(events, timeout=1.0, return_when=asyncio.FIRST_COMPLETED)
            if self._ended.done():
                await asyncio.wait((self._reports.ended,), timeout=LAST_REPORT_SECONDS)
            if until is not None and until.done():
                return None
            if self._ended.done():
                self._close()
                code = self._ended.result()
                return ProcessExit(_describe(code), code not in EXTERNAL_EXIT_CODES)
            if not done:
                self._signs.count_second(others_serve())
            if (fault := self._signs.fault(limits)) is not None:
                await self._end()
                return fault

    async def _end(self) -> None:
        """Kills the child if it runs, waits for its end and closes the pipes."""
        self.kill()
        if not (await asyncio.wait((self._ended,), timeout=KILL_SECONDS))[0]:
            log.error("the %s process %d was killed, but does not end", self.spec.name, self.pid)
        self._close()

    def _close(self) -> None:
        self._reports.close()
        if self._stdin is not None and not self._stdin.is_closing():
            self._stdin.abort()

    def _hear(self, line: bytes) -> None:
        """Handles a line of the child's stdout."""
        try:
            report = _REPORT.decode(line)
        except DECODE_ERRORS as error:
            log.warning("the %s process wrote %.100r, which is no report: %s", self.spec.name, line, error)
            report = None
        self._signs.hear(report)
        if isinstance(report, Ready | Failed) and not self._first_report.done():
            self._first_report.set_result(report)
        elif isinstance(report, Failed):
            log.error("the %s process: %s", self.spec.name, report.message)


class _ReportReader(asyncio.Protocol):
    """Splits the child's stdout into lines. A line of more than MAX_REPORT_BYTES is dropped."""

    def __init__(self, hear: Callable[[bytes], None]) -> None:
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._hear = hear
        self._transport: asyncio.BaseTransport | None = None
        self._unfinished = b""
        self._is_too_long = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the event loop."""
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Called by the event loop."""
        *lines, self._unfinished = (self._unfinished + data).split(b"\n")
        for line in lines:
            self._hear(b"a line whose bytes exceed the limit" if self._is_too_long else line)
            self._is_too_long = False
        if len(self._unfinished) > MAX_REPORT_BYTES:
            self._unfinished, self._is_too_long = b"", True

    def connection_lost(self, _error: Exception | None) -> None:
        """Called by the event loop."""
        if not self.ended.done():
            self.ended.set_result(None)

    def close(self) -> None:
        """Stops reading."""
        if self._transport is not None:
            self._transport.close()


def _spawn(spec: ProcessSpec) -> subprocess.Popen[bytes]:
    with signals.blocked():  # until the child ignores them
        return subprocess.Popen(
            [sys.executable, "-P", "-m", spec.module, *spec.arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=tuple(spec.descriptors),
            env=_environment(spec.environment),
        )


def _wait(child: subprocess.Popen[bytes], loop: asyncio.AbstractEventLoop, ended: asyncio.Future[int]) -> None:
    """Waits for the child's end, in a thread: whatever still holds its pipes does not matter."""
    code = child.wait()

    def tell() -> None:
        if not ended.done():
            ended.set_result(code)

    with contextlib.suppress(RuntimeError):  # the loop is closed
        loop.call_soon_threadsafe(tell)


def _describe(code: int) -> str:
    return f"was killed by signal {-code}" if code < 0 else f"exited with code {code}"
