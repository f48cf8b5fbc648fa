"""The parent's side of a process: start it by name, read its report and its pulse, notice its end, end it in order.

    ProcessSpec (what to run) --start--> Process (one incarnation) --report--> Ready | Failed
                                     |--> Heartbeat, each second: one that falls silent, or gets stuck, is killed,
                                     |    before its report as after it, where a start may take its time
                                     '--> exit

Knows nothing of what the processes do, nor of the flags.
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
_ROOT = Path(__file__).resolve().parents[2]
_LIMIT = 1 << 20  # bytes of a report line
SILENT_SECONDS = 5
START_SILENT_SECONDS = 60  # a large library that is loaded from a slow disk holds up every thread of the interpreter
START_BUSY_SECONDS = 600.0  # for one part of the start: a tensor, a kernel, an adapter
EXTERNAL_EXIT_CODES = (0, -signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP)


@dataclass(frozen=True)
class ProcessSpec:
    """What to run: `python -P -m module arguments`, with its config and the descriptors it inherits."""

    name: str
    module: str
    config: msgspec.Struct
    arguments: Sequence[str] = ()
    descriptors: Sequence[int] = ()
    environment: dict[str, str] = field(default_factory=dict)


@functools.cache
def _python_path() -> str | None:
    """None where an isolated interpreter finds this very package, else the directory that holds it."""
    probe = "import importlib.util as u; s = u.find_spec('engine'); print(s.origin if s else '')"
    found = subprocess.run([sys.executable, "-P", "-c", probe], capture_output=True, text=True, check=False, cwd="/")
    return None if found.stdout.strip() == str(_ROOT / "engine" / "__init__.py") else str(_ROOT)


def _environment(extra: dict[str, str]) -> dict[str, str]:
    env = {**os.environ, "PYTHONSAFEPATH": "1", **extra}
    root = _python_path()
    if root is not None:
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [root, env.get("PYTHONPATH")]))
    return env


@dataclass(frozen=True)
class ProcessExit:
    """How a process ended, in words, and whether that was its own doing: somebody's `kill -9` is not."""

    words: str
    own_fault: bool


class Process:
    """One incarnation of a child. Whoever starts it stops it."""

    def __init__(self, spec: ProcessSpec, process: asyncio.subprocess.Process) -> None:
        self.spec = spec
        self._process = process

    @classmethod
    async def start(cls, spec: ProcessSpec) -> Process:
        """Starts the child and hands it its config; its standard error is ours."""
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
            limit=_LIMIT,
        )
        assert process.stdin is not None
        with contextlib.suppress(ConnectionError):  # it died already: report() says so
            process.stdin.write(msgspec.json.encode(spec.config) + b"\n")
            await process.stdin.drain()
        return cls(spec, process)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    async def report(self) -> Ready:
        """Its report. Raises the error it failed with, or EngineDead when it died without a word or had to be killed:
        it was silent, or did not get on with its start.
        """
        word = await self._listen(START_SILENT_SECONDS, START_BUSY_SECONDS)
        match word:
            case Ready():
                return word
            case Failed():
                raise error_from_wire(word.kind, word.message, None, None)
            case ProcessExit():
                self.kill()
                await self._process.wait()
                raise EngineDead(f"the {self.spec.name} process {word.words} before it was ready; its log is above")
        raise EngineDead(f"the {self.spec.name} process {await self._way_out()} while starting; its log is above")

    async def end(self, busy: float) -> ProcessExit:
        """Waits for its end, and kills it when it is silent or at one piece of work for more than `busy` seconds."""
        watch, exited = asyncio.ensure_future(self._stuck(busy)), asyncio.ensure_future(self._process.wait())
        try:
            await asyncio.wait((watch, exited), return_when=asyncio.FIRST_COMPLETED)
            if exited.done():
                return ProcessExit(_ended(exited.result()), exited.result() not in EXTERNAL_EXIT_CODES)
            self.kill()
            await exited
            return watch.result()
        finally:
            watch.cancel()
            exited.cancel()

    async def _way_out(self) -> str:
        """Waits for the end of a process that says no more, and kills it when that takes too long; how it ended."""
        try:
            await asyncio.wait_for(self._process.wait(), SILENT_SECONDS)
        except TimeoutError:
            self.kill()
        return await self.exit()

    async def _stuck(self, busy: float) -> ProcessExit:
        """Waits until it falls silent or gets stuck."""
        while not isinstance(word := await self._listen(SILENT_SECONDS, busy), ProcessExit):
            if word is None:  # it has ended, and that is noticed elsewhere, unless it hangs on its way out
                await asyncio.sleep(SILENT_SECONDS)
                return _silent(SILENT_SECONDS)
        return word

    async def _listen(self, silence: int, busy: float) -> Ready | Failed | ProcessExit | None:
        """Its next word that is no pulse, or None after its last one; the end it is to have if it falls silent before,
        or is at one piece of work for more than `busy` seconds.

        Silence is counted in seconds that this process lived through: one that was stopped itself, and goes on, finds
        the words of the others waiting.
        """
        silent, line = 0, asyncio.ensure_future(self._line())
        try:
            while silent < silence:
                await asyncio.wait((line,), timeout=1.0)
                if not line.done():
                    silent += 1
                    continue
                if not line.result():
                    return None
                word, silent = self._word(line.result()), 0
                if isinstance(word, Heartbeat) and word.busy > busy:
                    return ProcessExit(f"was stuck for {word.busy:.0f} seconds and was killed", own_fault=True)
                if isinstance(word, Ready | Failed):
                    return word
                line = asyncio.ensure_future(self._line())
        finally:
            line.cancel()
        return _silent(silence)

    async def _line(self) -> bytes:
        """The next line; nothing at the end."""
        assert self._process.stdout is not None
        try:
            return await self._process.stdout.readline()
        except ValueError as error:  # it is too long, and was dropped
            return str(error).encode()

    def _word(self, line: bytes) -> Ready | Failed | Heartbeat | None:
        try:
            return _REPORT.decode(line)
        except DECODE_ERRORS as error:
            log.warning("the %s process wrote %.100r, which is no report: %s", self.spec.name, line, error)
            return None

    async def exit(self) -> str:
        """Waits for its end; says how it ended."""
        return _ended(await self._process.wait())

    async def stop(self, timeout: float) -> None:
        """Asks it to end (SIGTERM); after `timeout` seconds it is killed."""
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
        """Ends it at once."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()


def _ended(code: int) -> str:
    return f"was killed by signal {-code}" if code < 0 else f"exited with code {code}"


def _silent(seconds: int) -> ProcessExit:
    return ProcessExit(f"gave no sign of life for {seconds} seconds and was killed", own_fault=False)
