"""Logging to stderr: one line a record, with the process it came from. Knows nothing of what is logged."""

from __future__ import annotations

import json
import logging
import re
import sys

LONGEST_VALUE = 200
_PLAIN = re.compile(r"[\w./:,@+%*~-]+", re.ASCII)


def setup(process: str, level: str) -> None:
    """Configures the root logger of this process; `level` is debug, info, warning or error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname).1s {process}: %(message)s", "%H:%M:%S"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())


def pairs(**values: object) -> str:
    """`key=value key=value`, without those that are None.

    Whatever a stranger chose to put into a value, it stays one value of one line: long ones are cut, others than plain
    words are quoted as JSON quotes them.
    """
    return " ".join(f"{key}={_shown(value)}" for key, value in values.items() if value is not None)


def _shown(value: object) -> str:
    text = f"{value:.3f}" if isinstance(value, float) else str(value)
    if len(text) > LONGEST_VALUE:
        text = text[: LONGEST_VALUE - 3] + "..."
    return text if _PLAIN.fullmatch(text) else json.dumps(text)
