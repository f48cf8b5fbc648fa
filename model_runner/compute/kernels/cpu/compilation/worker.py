"""The builder process: one function after the other, each tried before it is put in its place.

What crashes is a process that serves nobody. Knows nothing of what the functions are for.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import NoReturn

import msgspec
import torch

from model_runner.compute.kernels.cpu.compilation import compiler
from model_runner.compute.kernels.cpu.compilation.cache import Cache, seal
from model_runner.compute.kernels.cpu.compilation.cleanup import Leaving
from model_runner.compute.kernels.cpu.compilation.messages import Job, Order, Report
from model_runner.compute.kernels.cpu.functions import registry
from model_runner.compute.kernels.cpu.functions.program import differs

log = logging.getLogger(__name__)


def build(order: Order, leaving: Leaving) -> NoReturn:
    """Builds and reports, then ends the process."""
    torch.set_num_threads(1)
    root = Path(order.jobs[0].path).parent
    with os.fdopen(order.pipe, "wb") as pipe, Cache(root).workshop() as workshop:
        leaving.workshop = workshop
        os.environ["TMPDIR"] = str(workshop)  # the compiler's
        for number, job in enumerate(order.jobs):
            pipe.write(msgspec.json.encode(_do(job, workshop / f"{number}.so")) + b"\n")
            pipe.flush()
    os._exit(0)  # nobody waits for an orderly end of torch


def _do(job: Job, library: Path) -> Report:
    try:
        program = registry.program(job.function)
        compiler.build(program.source, compiler.DEFINES[job.function.dtype], library)
        if found := differs(compiler.load(library, program.arguments(1)), program):
            return Report(f"its results differ {found}")
        seal(library, Path(job.path))
    except Exception as error:
        log.debug("%s", job.function, exc_info=True)
        return Report(_line(error))
    return Report()


def _line(error: Exception) -> str:
    """The first line that says something: compilers say pages."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
