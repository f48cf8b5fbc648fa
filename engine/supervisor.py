"""The parent's side of a process: start it by name, read its one report, notice its death, end it in order.

    Spec (what to run) --start--> Process (one incarnation) --report--> Ready | Failed
                                     '--> exit

Knows nothing of what the processes do, nor of the flags.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from engine.child import Failed, Ready
from engine.errors import EngineDead, revive

_REPORT: msgspec.json.Decoder[Ready | Failed] = msgspec.json.Decoder(Ready | Failed)
_ROOT = Path(__file__).resolve().parent.parent
_LIMIT = 1 << 20  # bytes of a report line


@dataclass(frozen=True)
class Spec:
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


class Process:
    """One incarnation of a child. Whoever starts it stops it."""

    def __init__(self, spec: Spec, process: asyncio.subprocess.Process) -> None:
        self.spec = spec
        self._process = process

    @classmethod
    async def start(cls, spec: Spec) -> Process:
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
        """Its first line. Raises the error it failed with, or EngineDead when it died without a word."""
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        if not line:
            code = await self._process.wait()
            raise EngineDead(f"the {self.spec.name} process {_ended(code)} while starting; its log is above")
        report = _REPORT.decode(line)
        if isinstance(report, Failed):
            raise revive(report.kind, report.message, None, None)
        return report

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


class Supervisor:
    """A group of processes that live and die together. `async with` starts them; leaving ends them, last one first.

    In the order given, a later process may depend on an earlier one: so the last is the first to stop.
    """

    def __init__(self, specs: Sequence[Spec], grace: float = 15.0) -> None:
        self._specs = specs
        self._grace = grace
        self._processes: list[Process] = []

    async def __aenter__(self) -> Supervisor:
        try:
            for spec in self._specs:
                self._processes.append(await Process.start(spec))
        except BaseException:
            await self.stop(self._grace)
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop(self._grace)

    async def ready(self) -> dict[str, Ready]:
        """Everyone's report, by name. Raises the error of one that failed."""
        waiting = {asyncio.ensure_future(process.report()): process.spec.name for process in self._processes}
        try:
            _, pending = await asyncio.wait(waiting, return_when=asyncio.FIRST_EXCEPTION)
            if pending:  # one failed; another's failure may be the reason, and is then about to arrive
                await asyncio.wait(waiting, timeout=0.2)
        finally:
            for task in waiting:
                task.cancel()
        errors = [task.exception() for task in waiting if task.done() and not task.cancelled()]
        failed = sorted(filter(None, errors), key=lambda error: isinstance(error, EngineDead))
        if failed:
            raise failed[0]
        return {name: task.result() for task, name in waiting.items()}

    async def first_death(self) -> str:
        """Waits until one of them ends; says which and how."""
        waiting = {asyncio.ensure_future(process.exit()): process.spec.name for process in self._processes}
        try:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waiting:
                task.cancel()
        return ", ".join(f"the {waiting[task]} process {task.result()}" for task in done)

    async def stop(self, grace: float) -> None:
        """Ends all, in order, the last one first; each has `grace` seconds."""
        while self._processes:
            await self._processes[-1].stop(grace)
            self._processes.pop()

    def kill(self) -> None:
        """Ends all at once."""
        for process in self._processes:
            process.kill()
