"""The scheduler process: the launcher runs `python -P -m scheduler` and writes the config to its stdin."""

from __future__ import annotations

import sys

from engine import logs
from engine.config.process_configs import SchedulerConfig
from engine.errors import EngineError
from engine.processes.child import Child
from scheduler.server import serve


def main() -> None:
    """Runs the scheduler until it is stopped (exit status 0), or until an error such as a failed audit (status 1)."""
    child = Child(is_bound=True)
    child.begin_startup()
    try:
        config = child.config(SchedulerConfig)
        logs.setup("scheduler", config.log_level)
        serve(config, child)
    except EngineError as error:
        child.failed(error)
        sys.exit(1)
    except Exception as error:
        child.failed(error)
        raise


if __name__ == "__main__":
    main()
