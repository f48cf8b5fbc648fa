"""The entry point of a loader child: low priority, and the first process that the kernel kills when memory is short."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from engine import logs
from engine.processes.child import Child

NICENESS = 10


def main() -> None:
    """Lowers its priority, reads the config, then serves. torch is imported after the priority is lowered."""
    os.nice(NICENESS)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    child = Child(is_bound=True)
    from model_runner.lora.loading.messages import LoaderConfig
    from model_runner.lora.loading.worker import serve

    config = child.config(LoaderConfig)
    logs.setup("loader", config.log_level)
    serve(config)


if __name__ == "__main__":
    main()
