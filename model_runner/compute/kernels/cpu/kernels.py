"""The CPU kernels of a runner: those in the cache are loaded at once, a child process builds the others.

    request --> in the cache? -- yes --> load, check, use
                   |                          ^
                   no --> the child builds ---+  poll, between steps

`get` returns None until a kernel is loaded and checked, and always if building or checking it failed; the caller then
computes in torch. Does not depend on what the kernels compute.
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

from engine.config.server_args import CpuKernels, LogLevel
from engine.errors import ConfigError
from engine.processes.busy_timer import BusyTimer
from model_runner.compute.kernels.cpu.compilation import compiler
from model_runner.compute.kernels.cpu.compilation.builder import Builder, BuilderGone
from model_runner.compute.kernels.cpu.compilation.cache import KernelCache, UnsafeDirectory, default_directory
from model_runner.compute.kernels.cpu.compilation.messages import BuildJob, BuildOrder, BuildResult
from model_runner.compute.kernels.cpu.functions import registry
from model_runner.compute.kernels.cpu.functions.spec import TOLERANCE, Kernel, KernelKey, compare
from model_runner.platform.device import dtype_name

log = logging.getLogger(__name__)

BuildMode = Literal["never", "background", "before_serving"]
"""When missing kernels are built."""

SECONDS_PER_KERNEL = 1
"""The approximate time that a compiler takes for one kernel."""

SIZES_CHECKED = 2
"""The number of sizes at which a kernel is checked when it is loaded.

The builder checks a kernel at all sizes, but while the runner checks one, requests wait.
"""

POLL_SECONDS = 1.0
"""The interval at which an idle runner polls whether a kernel has been built."""


def resolve(mode: CpuKernels, device: torch.device, dtype: torch.dtype) -> BuildMode:
    """Returns the build mode that `--cpu-kernels` selects on this device.

    Raises ConfigError if the flag is on and there are no kernels for this device or dtype.
    """
    if device.type != "cpu":
        if mode == "on":
            raise ConfigError("--cpu-kernels on: they are for a CPU, CUDA has kernels of its own; leave it out")
        return "never"
    if mode == "on":
        if dtype not in TOLERANCE:
            raise ConfigError(f"--cpu-kernels on: they compute in bfloat16 and float32, not in {dtype_name(dtype)}")
        return "before_serving"
    if mode == "auto" and dtype is torch.bfloat16:
        return "background"
    log.info("no kernels are compiled for this CPU: %s", _why_never(mode, dtype))
    return "never"


def _why_never(mode: CpuKernels, dtype: torch.dtype) -> str:
    if mode == "off":
        return "--cpu-kernels is off"
    if dtype in TOLERANCE:
        return f"--cpu-kernels auto compiles them for bfloat16 only, on for {dtype_name(dtype)} too"
    return f"there are none for {dtype_name(dtype)}"


class KernelSet:
    """The requested kernels, of which those that are built can be called. `root`: the cache directory, None for the
    user's default one.
    """

    def __init__(self, build_mode: BuildMode, root: Path | None = None, *, log_level: LogLevel = "info") -> None:
        self.build_mode = build_mode
        self._root = root
        self._log_level = log_level
        self._kernels: dict[KernelKey, Kernel] = {}
        self._cache: KernelCache | None = None
        self._builder: Builder | None = None
        self._jobs: deque[BuildJob] = deque()
        self._logged_errors: set[str] = set()
        self._requested = 0
        self._started = 0.0

    def get(self, key: KernelKey) -> Kernel | None:
        """Returns the kernel, or None until it is built and checked."""
        return self._kernels.get(key)

    @property
    def poll_seconds(self) -> float | None:
        """How long the runner may wait before it calls `poll` again; None: without limit."""
        return POLL_SECONDS if self.building else None

    @property
    def building(self) -> bool:
        """Whether `poll` may still change what `get` returns."""
        return self._builder is not None

    @property
    def builder_pid(self) -> int | None:
        """The process id of the builder, None if none is running."""
        return None if self._builder is None else self._builder.pid

    def request(self, keys: Iterable[KernelKey], *, progress: BusyTimer | None = None) -> None:
        """Loads the kernels that are in the cache and starts building the others. Called once.

        In the mode before_serving it returns only when all kernels are built, shows a progress bar if `progress` is
        given, and raises ConfigError if nothing can be compiled. In the other modes it returns at once.
        """
        wanted = list(dict.fromkeys(keys))
        if self.build_mode == "never" or not wanted:
            return
        self._requested, self._started = len(wanted), time.perf_counter()
        try:
            self._cache = KernelCache(self._root or default_directory())
        except UnsafeDirectory as error:
            self._cannot_build(str(error))
            return
        jobs = [BuildJob(key, str(self._cache.path(key))) for key in wanted]
        missing = [job for job in jobs if not self._load(job)]
        if self._kernels:
            milliseconds = 1e3 * (time.perf_counter() - self._started)
            log.info("%d kernels compiled earlier, loaded in %.0f ms", len(self._kernels), milliseconds)
        if missing:
            self._build(missing, progress=progress)

    def poll(self) -> None:
        """Loads the next kernel that the builder has finished. Takes microseconds if there is none."""
        if self._builder is None:
            return
        try:
            result = self._builder.receive()
        except BuilderGone as gone:
            if self._jobs:
                log.warning("the builder %s: torch computes in place of %d kernels", gone, len(self._jobs))
            self._builder = None
            return
        if result is not None and self._jobs:
            self._handle(result)

    def close(self) -> None:
        """Stops the builder. Kernels that are loaded stay usable."""
        builder, self._builder = self._builder, None
        if builder is not None:
            builder.stop()

    def _handle(self, result: BuildResult) -> None:
        job = self._jobs.popleft()
        if result.error:
            level = logging.DEBUG if result.error in self._logged_errors else logging.WARNING
            self._logged_errors.add(result.error)
            log.log(level, "%s is not compiled: %s", job.key, result.error)
        elif not self._load(job):
            log.warning("%s was compiled, but its file is missing or damaged", job.key)
        if not self._jobs:
            seconds = time.perf_counter() - self._started
            log.info("compiled: %d of %d kernels in use, %.0f s", len(self._kernels), self._requested, seconds)

    def _load(self, job: BuildJob) -> bool:
        """Loads a cached kernel, and uses it from now on if its results are right. Returns whether the cache has it."""
        path = Path(job.path)
        if self._cache is None or not self._cache.is_intact(path):
            return False
        try:
            spec = registry.spec_for(job.key)
            kernel = compiler.load(path, spec.arguments(1))
            fault = compare(kernel, spec, SIZES_CHECKED)
        except Exception as error:
            fault = str(error).partition("\n")[0]
        if fault:
            log.warning("%s as compiled is not used: %s", job.key, fault)
        else:
            self._kernels[job.key] = kernel
        return True

    def _build(self, jobs: list[BuildJob], *, progress: BusyTimer | None) -> None:
        if compiler.find_compiler() is None:
            self._cannot_build("no C++ compiler found: plain torch computes, which is slower; install g++")
            return
        try:
            self._builder = Builder(BuildOrder(jobs, log_level=self._log_level))
        except OSError as error:
            self._cannot_build(f"the process that compiles cannot be started: {error}")
            return
        self._jobs = deque(jobs)
        first = self.build_mode == "before_serving"
        how = "before serving" if first else "while serving"
        log.info("compiling %d kernels %s, about %d s", len(jobs), how, SECONDS_PER_KERNEL * len(jobs))
        if first:
            self._wait_for_all(progress=progress)

    def _wait_for_all(self, *, progress: BusyTimer | None) -> None:
        with tqdm(total=len(self._jobs), desc="compiling", disable=progress is None, leave=False) as bar:
            while self._builder is not None:
                self._builder.wait()
                self.poll()
                if progress is not None:
                    progress.tick()
                bar.update(bar.total - len(self._jobs) - bar.n)

    def _cannot_build(self, reason: str) -> None:
        if self.build_mode == "before_serving":
            raise ConfigError(f"--cpu-kernels on: {reason}")
        log.warning("%s", reason)
