"""Logging to stderr: one line for each record, with the name of the process."""

from __future__ import annotations

import json
import logging
import re
import sys

MAX_VALUE_CHARS = 200
_PLAIN = re.compile(r"[\w./:,@+%*~-]+", re.ASCII)


def setup(process: str, level: str) -> None:
    """Configures the root logger of this process; `level` is debug, info, warning or error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname).1s {process}: %(message)s", "%H:%M:%S"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())


def pairs(**values: object) -> str:
    """Returns `key=value key=value ...`, without the values that are None.

    A value that a client chose cannot break the line: long values are cut, and values that are not plain words are
    quoted as in JSON.
    """
    return " ".join(f"{key}={_shown(value)}" for key, value in values.items() if value is not None)


def _shown(value: object) -> str:
    text = f"{value:.3f}" if isinstance(value, float) else str(value)
    if len(text) > MAX_VALUE_CHARS:
        text = text[: MAX_VALUE_CHARS - 3] + "..."
    return text if _PLAIN.fullmatch(text) else json.dumps(text)
