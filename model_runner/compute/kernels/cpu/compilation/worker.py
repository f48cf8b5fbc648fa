"""The work of the builder process: builds one kernel after another, and checks each before it enters the cache.

A kernel that crashes ends this process, not a runner. Does not depend on what the kernels compute.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import NoReturn

import msgspec
import torch

from engine.processes.child import leave
from model_runner.compute.kernels.cpu.compilation import compiler
from model_runner.compute.kernels.cpu.compilation.cache import KernelCache, install
from model_runner.compute.kernels.cpu.compilation.messages import BuildJob, BuildOrder, BuildResult
from model_runner.compute.kernels.cpu.compilation.shutdown import ShutdownHandler
from model_runner.compute.kernels.cpu.functions import registry
from model_runner.compute.kernels.cpu.functions.spec import compare

log = logging.getLogger(__name__)


def build_all(order: BuildOrder, shutdown: ShutdownHandler) -> NoReturn:
    """Builds the kernel of each job and sends the job's result; then ends the process."""
    torch.set_num_threads(1)
    root = Path(order.jobs[0].path).parent
    with os.fdopen(order.pipe, "wb") as pipe, KernelCache(root).build_directory() as directory:
        shutdown.build_directory = directory
        os.environ["TMPDIR"] = str(directory)  # the compiler writes its temporary files there
        for number, job in enumerate(order.jobs):
            pipe.write(msgspec.json.encode(_build(job, directory / f"{number}.so")) + b"\n")
            pipe.flush()
    leave()  # skips torch's slow exit


def _build(job: BuildJob, library: Path) -> BuildResult:
    try:
        spec = registry.spec_for(job.key)
        compiler.build(spec.source, compiler.DEFINES[job.key.dtype], library)
        if fault := compare(compiler.load(library, spec.arguments(1)), spec):
            return BuildResult(f"its results differ {fault}")
        install(library, Path(job.path))
    except Exception as error:
        log.debug("%s", job.key, exc_info=True)
        return BuildResult(_first_line(error))
    return BuildResult()


def _first_line(error: Exception) -> str:
    """Returns the error's type and its first line with text: a compiler's message may have hundreds of lines."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
