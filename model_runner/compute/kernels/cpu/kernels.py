"""The compiled functions of a runner: what is kept from before at once, the rest when a child has built it.

    want --> in the cache? -- yes --> load, try, adopt
                |                          ^
                no --> the child builds ---+  poll, between steps

Until a function is adopted, and for ever where something fails, `get` gives None and the caller computes as before.
Knows nothing of what the functions are for.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from engine.config.args import CpuKernels, LogLevel
from engine.errors import ConfigError
from model_runner.compute.kernels.cpu.compilation import compiler
from model_runner.compute.kernels.cpu.compilation.builder import Builder, Gone
from model_runner.compute.kernels.cpu.compilation.cache import Cache, Unsafe, directory
from model_runner.compute.kernels.cpu.compilation.messages import Job, Order, Report
from model_runner.compute.kernels.cpu.functions import registry
from model_runner.compute.kernels.cpu.functions.program import ROUNDING, Function, Kernel, differs
from model_runner.platform.device import dtype_name

log = logging.getLogger(__name__)

When = Literal["never", "beside", "first"]
"""Nothing is compiled; while the runner serves; before it serves."""

SECONDS = 1
"""What one function takes a compiler, about."""

TRIES = 2
"""Of the sizes that the builder has tried, before somebody waits for it."""

LOOK_SECONDS = 1.0
"""How often an idle runner looks whether a function has become ready."""


def resolve(mode: CpuKernels, device: torch.device, dtype: torch.dtype) -> When:
    """What `--cpu-kernels` means here. Raises ConfigError where it is on and cannot be."""
    if device.type != "cpu":
        if mode == "on":
            raise ConfigError("--cpu-kernels on: they are for a CPU, CUDA has kernels of its own; leave it out")
        return "never"
    if mode == "on":
        if dtype not in ROUNDING:
            raise ConfigError(f"--cpu-kernels on: they compute in bfloat16 and float32, not in {dtype_name(dtype)}")
        return "first"
    if mode == "auto" and dtype is torch.bfloat16:
        return "beside"
    reason = (
        "is off" if mode == "off" else "on would do so" if dtype in ROUNDING else f"has none for {dtype_name(dtype)}"
    )
    log.info("nothing is compiled for this CPU: --cpu-kernels %s", reason)
    return "never"


class Kernels:
    """What of the wanted functions is compiled so far. `root`: where libraries are kept, None: the user's cache."""

    def __init__(self, when: When, root: Path | None = None, *, log_level: LogLevel = "info") -> None:
        self.when = when
        self._root = root
        self._log_level = log_level
        self._kernels: dict[Function, Kernel] = {}
        self._cache: Cache | None = None
        self._builder: Builder | None = None
        self._jobs: deque[Job] = deque()
        self._said: set[str] = set()
        self._wanted = 0
        self._began = 0.0

    def get(self, function: Function) -> Kernel | None:
        """The compiled function, once it is there."""
        return self._kernels.get(function)

    @property
    def wait(self) -> float | None:
        """For how many seconds `poll` need not be called; None: for ever."""
        return LOOK_SECONDS if self.building else None

    @property
    def building(self) -> bool:
        """Whether `poll` may still change what `get` gives."""
        return self._builder is not None

    @property
    def pid(self) -> int | None:
        """The process id of the builder, while it runs."""
        return None if self._builder is None else self._builder.pid

    def want(self, functions: Iterable[Function], *, progress: bool = False) -> None:
        """Says, once, what will be asked for. Returns at once, or if they come first, when all are there: a bar shows
        how far it is. Raises ConfigError where they come first and nothing can be compiled.
        """
        wanted = list(dict.fromkeys(functions))
        if self.when == "never" or not wanted:
            return
        self._wanted, self._began = len(wanted), time.perf_counter()
        try:
            self._cache = Cache(self._root or directory())
        except Unsafe as unsafe:
            self._without(str(unsafe))
            return
        jobs = [Job(function, str(self._cache.path(function))) for function in wanted]
        missing = [job for job in jobs if not self._adopt(job)]
        if self._kernels:
            milliseconds = 1e3 * (time.perf_counter() - self._began)
            log.info("%d kernels compiled earlier, loaded in %.0f ms", len(self._kernels), milliseconds)
        if missing:
            self._build(missing, progress=progress)

    def poll(self) -> None:
        """Takes the next function that has become ready, if one has. Microseconds where none has."""
        if self._builder is None:
            return
        try:
            report = self._builder.hear()
        except Gone as gone:
            if self._jobs:
                log.warning("the builder %s: %d kernels stay as they are", gone, len(self._jobs))
            self._builder = None
            return
        if report is not None and self._jobs:
            self._take(report)

    def close(self) -> None:
        """Ends the builder; what is there stays."""
        builder, self._builder = self._builder, None
        if builder is not None:
            builder.end()

    def _take(self, report: Report) -> None:
        job = self._jobs.popleft()
        if report.error:
            level = logging.DEBUG if report.error in self._said else logging.WARNING
            self._said.add(report.error)
            log.log(level, "%s is not compiled: %s", job.function, report.error)
        elif not self._adopt(job):
            log.warning("%s was compiled, and cannot be loaded", job.function)
        if not self._jobs:
            seconds = time.perf_counter() - self._began
            log.info("compiled: %d of %d kernels in place, %.0f s", len(self._kernels), self._wanted, seconds)

    def _adopt(self, job: Job) -> bool:
        """Loads what is there, and takes it if it computes what it should. False: there is nothing to load."""
        path = Path(job.path)
        if self._cache is None or not self._cache.sound(path):
            return False
        try:
            program = registry.program(job.function)
            kernel = compiler.load(path, program.arguments(1))
            found = differs(kernel, program, TRIES)
        except Exception as error:
            found = str(error).partition("\n")[0]
        if found:
            log.warning("%s as compiled is not used: %s", job.function, found)
        else:
            self._kernels[job.function] = kernel
        return True

    def _build(self, jobs: list[Job], *, progress: bool) -> None:
        if compiler.find_compiler() is None:
            self._without("no C++ compiler found: plain torch computes, which is slower; install g++")
            return
        try:
            self._builder = Builder(Order(jobs, log_level=self._log_level))
        except OSError as error:
            self._without(f"nothing can be compiled: {error}")
            return
        self._jobs = deque(jobs)
        first = self.when == "first"
        how = "before" if first else "beside"
        log.info("compiling %d kernels %s the serving, about %d s", len(jobs), how, SECONDS * len(jobs))
        if first:
            self._finish(progress=progress)

    def _finish(self, *, progress: bool) -> None:
        with tqdm(total=len(self._jobs), desc="compiling", disable=not progress, leave=False) as bar:
            while self._builder is not None:
                self._builder.wait()
                self.poll()
                bar.update(bar.total - len(self._jobs) - bar.n)

    def _without(self, reason: str) -> None:
        if self.when == "first":
            raise ConfigError(f"--cpu-kernels on: {reason}")
        log.warning("%s", reason)
