"""Reads text files of model and adapter directories: regular files of bounded size.

A pipe does not block the reader, and at most the bound is read. Knows nothing of the files' meaning.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from engine.errors import ConfigError

MAX_TOKENIZER = 64 << 20
MAX_CONFIG = 16 << 20
MAX_TEMPLATE = 1 << 20


def read(path: Path, limit: int) -> bytes | None:
    """The file's bytes; None if there is none. Raises ConfigError if it is larger than `limit`, or not regular."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ConfigError(f"{path} cannot be read: it is no regular file")
        found = file.read(limit + 1)
    if len(found) > limit:
        raise ConfigError(f"{path} cannot be read: it has more than {limit >> 20} MiB")
    return found
