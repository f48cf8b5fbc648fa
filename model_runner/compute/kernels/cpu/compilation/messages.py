"""What a runner and its builder say to one another.

runner                                  builder
  | -- Order, a JSON line on stdin ------->|   once; the end of stdin ends the builder
  |<-- Report, a JSON line on a pipe ------|   for each function, in the order asked for
"""

from __future__ import annotations

import msgspec

from engine.config.args import LogLevel
from model_runner.compute.kernels.cpu.functions.program import Function


class Job(msgspec.Struct, frozen=True):
    """A function, and the file that it becomes."""

    function: Function
    path: str


class Order(msgspec.Struct, frozen=True):
    """What is to be built; `pipe` is the descriptor to report on."""

    jobs: list[Job]
    pipe: int = -1
    log_level: LogLevel = "info"


class Report(msgspec.Struct, frozen=True):
    """The next function's library is in its place, or why there is none."""

    error: str = ""
