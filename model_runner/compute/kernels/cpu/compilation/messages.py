"""The messages between a runner and its builder process.

runner                                       builder
  | -- BuildOrder, a JSON line on stdin ------->|   once; the end of stdin ends the builder
  |<-- BuildResult, a JSON line on a pipe ------|   one for each job, in the order of the jobs
"""

from __future__ import annotations

import msgspec

from engine.config.server_args import LogLevel
from model_runner.compute.kernels.cpu.functions.spec import KernelKey


class BuildJob(msgspec.Struct, frozen=True):
    """A kernel to build, and the file that its library is written to."""

    key: KernelKey
    path: str


class BuildOrder(msgspec.Struct, frozen=True):
    """All kernels to build, in order. `pipe` is the file descriptor that the results are written to."""

    jobs: list[BuildJob]
    pipe: int = -1
    log_level: LogLevel = "info"


class BuildResult(msgspec.Struct, frozen=True):
    """The result of the next job: its library is in the cache, or `error` says why it is not."""

    error: str = ""
