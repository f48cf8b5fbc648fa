"""The builder process: niced, and the first process that Linux kills when memory is short."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

from engine import logs
from engine.processes.child import Child

NICENESS = 10


def main() -> None:
    """Lowers the process's priority, reads the BuildOrder and builds. Imports torch after the priority is lowered."""
    os.nice(NICENESS)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    from model_runner.compute.kernels.cpu.compilation.shutdown import ShutdownHandler

    shutdown = ShutdownHandler()
    child = Child(on_stop=shutdown, on_orphaned=shutdown)
    signal.signal(signal.SIGTERM, lambda *_: None)  # unlike SIG_IGN, not inherited by compilers, which SIGTERM ends
    from model_runner.compute.kernels.cpu.compilation.messages import BuildOrder
    from model_runner.compute.kernels.cpu.compilation.worker import build_all

    order = child.config(BuildOrder)
    logs.setup("builder", order.log_level)
    build_all(order, shutdown)


if __name__ == "__main__":
    main()
