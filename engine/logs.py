"""Logging to stderr: one line a record, with the process it came from. Knows nothing of what is logged."""

from __future__ import annotations

import logging
import sys


def setup(process: str, level: str) -> None:
    """Configures the root logger of this process; `level` is debug, info, warning or error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname).1s {process}: %(message)s", "%H:%M:%S"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
