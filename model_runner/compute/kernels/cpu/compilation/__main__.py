"""A builder as a runner starts it: niced, and the first process that the kernel ends when memory is short."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from engine import logs
from engine.processes.child import Child

NICENESS = 10


def main() -> None:
    """Gives way to everyone, reads the order, then builds; torch is imported only after the first of these."""
    os.nice(NICENESS)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    from model_runner.compute.kernels.cpu.compilation.cleanup import Leaving

    leaving = Leaving()
    child = Child(leaving)
    from model_runner.compute.kernels.cpu.compilation.messages import Order
    from model_runner.compute.kernels.cpu.compilation.worker import build

    order = child.config(Order)
    logs.setup("builder", order.log_level)
    build(order, leaving)


if __name__ == "__main__":
    main()
