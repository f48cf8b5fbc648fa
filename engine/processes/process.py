"""The parent's side of a child process: starts it, reads its report and heartbeats, waits for its exit, stops it.

ProcessSpec (what to run) --start--> Process (one incarnation) --> Ready | Failed, once
                                 |--> Heartbeat, each second: a process that is silent or stuck is killed, while it
                                 |    starts (with longer limits) as while it serves
                                 '--> ProcessExit
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from engine.errors import EngineDead, error_from_wire
from engine.ipc import DECODE_ERRORS
from engine.processes.child import Failed, Heartbeat, Ready

log = logging.getLogger(__name__)

_REPORT: msgspec.json.Decoder[Ready | Failed | Heartbeat] = msgspec.json.Decoder(Ready | Failed | Heartbeat)
_PACKAGE_ROOT = Path(__file__).resolve().parents[2]
MAX_REPORT_BYTES = 1 << 20
SILENT_SECONDS = 5
START_SILENT_SECONDS = 60  # importing a large library from a slow disk blocks all threads of the interpreter
START_BUSY_SECONDS = 600.0  # limit for one part of the startup: a tensor, a kernel, an adapter
EXTERNAL_EXIT_CODES = (0, -signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP)


@dataclass(frozen=True)
class ProcessSpec:
    """The command `python -P -m module arguments`, the config for its stdin, and the descriptors it inherits."""

    name: str
    module: str
    config: msgspec.Struct
    arguments: Sequence[str] = ()
    descriptors: Sequence[int] = ()
    environment: dict[str, str] = field(default_factory=dict)


@functools.cache
def _python_path() -> str | None:
    """Returns the directory to add to a child's PYTHONPATH, or None if the child finds this same package without it."""
    probe = "import importlib.util as u; s = u.find_spec('engine'); print(s.origin if s else '')"
    found = subprocess.run([sys.executable, "-P", "-c", probe], capture_output=True, text=True, check=False, cwd="/")
    return None if found.stdout.strip() == str(_PACKAGE_ROOT / "engine" / "__init__.py") else str(_PACKAGE_ROOT)


def _environment(extra: dict[str, str]) -> dict[str, str]:
    env = {**os.environ, "PYTHONSAFEPATH": "1", **extra}
    root = _python_path()
    if root is not None:
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [root, env.get("PYTHONPATH")]))
    return env


@dataclass(frozen=True)
class ProcessExit:
    """How a process ended. `own_fault` is False after an orderly end and after a signal from outside (`kill -9`)."""

    description: str
    own_fault: bool


class Process:
    """One incarnation of a child process. The code that starts it also stops it."""

    def __init__(self, spec: ProcessSpec, process: asyncio.subprocess.Process) -> None:
        self.spec = spec
        self._process = process

    @classmethod
    async def start(cls, spec: ProcessSpec) -> Process:
        """Starts the child and writes its config to its stdin. The child shares the parent's stderr."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",
            "-m",
            spec.module,
            *spec.arguments,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            pass_fds=tuple(spec.descriptors),
            env=_environment(spec.environment),
            limit=MAX_REPORT_BYTES,
        )
        assert process.stdin is not None
        with contextlib.suppress(ConnectionError):  # the child has died already; report() raises this
            process.stdin.write(msgspec.json.encode(spec.config) + b"\n")
            await process.stdin.drain()
        return cls(spec, process)

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    async def report(self) -> Ready:
        """Waits for the child's Ready and returns it.

        Raises the error that the child reports, or EngineDead if the child exits first or is silent or stuck.
        """
        report = await self._next_report(START_SILENT_SECONDS, START_BUSY_SECONDS)
        match report:
            case Ready():
                return report
            case Failed():
                raise error_from_wire(report.kind, report.message, None, None)
            case ProcessExit():
                self.kill()
                await self._process.wait()
                raise self._start_error(f"{report.description} before it was ready")
        raise self._start_error(f"{await self._wait_or_kill()} while starting")

    async def watch(self, max_busy: float) -> ProcessExit:
        """Waits for the exit. Kills the process if it is silent, or busy with one task for over `max_busy` seconds."""
        unhealthy = asyncio.ensure_future(self._wait_unhealthy(max_busy))
        exited = asyncio.ensure_future(self._process.wait())
        try:
            await asyncio.wait((unhealthy, exited), return_when=asyncio.FIRST_COMPLETED)
            if exited.done():
                return ProcessExit(_describe(exited.result()), exited.result() not in EXTERNAL_EXIT_CODES)
            self.kill()
            await exited
            return unhealthy.result()
        finally:
            unhealthy.cancel()
            exited.cancel()

    def _start_error(self, what: str) -> EngineDead:
        return EngineDead(f"the {self.spec.name} process {what}; its log is above")

    async def _wait_or_kill(self) -> str:
        """Waits for the exit of a process that has closed its stdout, and kills it after SILENT_SECONDS."""
        try:
            await asyncio.wait_for(self._process.wait(), SILENT_SECONDS)
        except TimeoutError:
            self.kill()
        return await self.wait_exit()

    async def _wait_unhealthy(self, max_busy: float) -> ProcessExit:
        """Waits until the process is silent or busy for too long. Returns the ProcessExit that describes this."""
        while not isinstance(report := await self._next_report(SILENT_SECONDS, max_busy), ProcessExit):
            if report is None:  # stdout is closed: either the process exits, which `watch` notices, or it hangs
                await asyncio.sleep(SILENT_SECONDS)
                return _silent(SILENT_SECONDS)
        return report

    async def _next_report(self, max_silence: int, max_busy: float) -> Ready | Failed | ProcessExit | None:
        """The next report other than a heartbeat, or None at the end of stdout.

        Returns a ProcessExit, and the child must be killed, if nothing arrives for `max_silence` seconds or a heartbeat
        reports more than `max_busy` busy seconds. Silence is counted only while the parent itself runs: after the
        parent was stopped and continued, it first reads what the child wrote meanwhile.
        """
        silent, line = 0, asyncio.ensure_future(self._read_line())
        try:
            while silent < max_silence:
                await asyncio.wait((line,), timeout=1.0)
                if not line.done():
                    silent += 1
                    continue
                if not line.result():
                    return None
                report, silent = self._decode(line.result()), 0
                if isinstance(report, Heartbeat) and report.busy > max_busy:
                    return ProcessExit(f"was stuck for {report.busy:.0f} seconds and was killed", own_fault=True)
                if isinstance(report, Ready | Failed):
                    return report
                line = asyncio.ensure_future(self._read_line())
        finally:
            line.cancel()
        return _silent(max_silence)

    async def _read_line(self) -> bytes:
        """Returns the next line of the child's stdout, empty at its end."""
        assert self._process.stdout is not None
        try:
            return await self._process.stdout.readline()
        except ValueError as error:  # the line exceeded MAX_REPORT_BYTES and was dropped
            return str(error).encode()

    def _decode(self, line: bytes) -> Ready | Failed | Heartbeat | None:
        try:
            return _REPORT.decode(line)
        except DECODE_ERRORS as error:
            log.warning("the %s process wrote %.100r, which is no report: %s", self.spec.name, line, error)
            return None

    async def wait_exit(self) -> str:
        """Waits for the exit and returns a description of it."""
        return _describe(await self._process.wait())

    async def stop(self, timeout: float) -> None:
        """Sends SIGTERM and waits for the exit; after `timeout` seconds sends SIGKILL."""
        if self._process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
        try:
            await asyncio.wait_for(self._process.wait(), timeout)
        except TimeoutError:
            self.kill()
            await self._process.wait()

    def kill(self) -> None:
        """Sends SIGKILL."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()


def _describe(code: int) -> str:
    return f"was killed by signal {-code}" if code < 0 else f"exited with code {code}"


def _silent(seconds: int) -> ProcessExit:
    return ProcessExit(f"gave no sign of life for {seconds} seconds and was killed", own_fault=False)
