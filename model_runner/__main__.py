"""`python -P -m model_runner`: the entry point of one rank of the model runner, started by the launcher."""

from __future__ import annotations

from engine import logs
from engine.config.process_configs import RunnerConfig
from engine.processes.child import Child


def main() -> None:
    """Reads the config, then serves. Torch is imported only after the child watches its parent and print() is
    redirected to the log.
    """
    child = Child(is_bound=True)
    busy_timer = child.begin_startup()
    config = child.config(RunnerConfig)
    logs.setup("runner", config.log_level)
    try:
        from model_runner.server import serve
    except Exception as error:
        child.failed(error)
        raise
    serve(child, config, busy_timer)


if __name__ == "__main__":
    main()
