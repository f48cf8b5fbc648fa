"""A loader as the runner starts it: niced, and the first process that the kernel ends when memory is short."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from engine import logs
from engine.processes.child import Child

NICENESS = 10


def main() -> None:
    """Gives way to the runner, reads the config, then serves; torch is imported only after the first of these."""
    os.nice(NICENESS)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    child = Child()
    from model_runner.lora.transfer.messages import LoaderConfig
    from model_runner.lora.transfer.worker import serve

    config = child.config(LoaderConfig)
    logs.setup("loader", config.log_level)
    serve(config)


if __name__ == "__main__":
    main()
