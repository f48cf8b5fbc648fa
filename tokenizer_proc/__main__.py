"""The entry point `python -m tokenizer_proc`: the launcher starts it and writes the config to its stdin."""

from __future__ import annotations

import logging
import sys

from engine.processes.child import Child


def main() -> int:
    """Runs the process until it ends. Returns its exit status."""
    child = Child(is_bound=True)
    busy_timer = child.begin_startup()
    try:
        import uvloop

        from engine import logs
        from engine.config.process_configs import TokenizerConfig
        from tokenizer_proc.server import serve
        from tokenizer_proc.work import freed_memory

        freed_memory.map_large_pieces()
        config = child.config(TokenizerConfig)
        logs.setup("tokenizer", config.log_level)
        uvloop.run(serve(child, config, busy_timer))
    except Exception as error:
        logging.getLogger(__name__).debug("the process cannot start or go on", exc_info=True)
        child.failed(error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
