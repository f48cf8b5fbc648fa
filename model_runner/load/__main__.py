"""`python -P -m model_runner.load`: a loader as the runner starts it: niced, the first to go when memory is short."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from engine import logs
from engine.child import Child

NICENESS = 10


def main() -> None:
    """Gives way to the runner, reads the config, then serves; torch is imported only after the first of these."""
    os.nice(NICENESS)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    child = Child()
    from model_runner.load.messages import LoaderConfig
    from model_runner.load.worker import serve

    config = child.config(LoaderConfig)
    logs.setup("loader", config.log_level)
    serve(config)


if __name__ == "__main__":
    main()
