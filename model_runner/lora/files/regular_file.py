"""Opens the files of an adapter: regular files only, as reading a pipe or a device may block or never end.

Links are followed. Knows nothing of the content of the files.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

from engine.errors import AdapterError


def open_regular(path: Path) -> BinaryIO:
    """The file, unbuffered. Raises AdapterError if it is missing or not a regular file."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise AdapterError(f"{path.name}: not found") from error
    except OSError as error:
        raise AdapterError(f"{path.name}: cannot be read ({error.strerror})") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise AdapterError(f"{path.name}: not a regular file")
    return os.fdopen(descriptor, "rb", buffering=0)


def read_bounded(path: Path, limit: int) -> bytes:
    """The content of the file. Raises AdapterError if it has more than `limit` bytes."""
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size <= limit:
            data = read_exactly(file, limit + 1)
            if len(data) <= limit:
                return data
    raise AdapterError(f"{path.name}: more than {limit} bytes")


def read_exactly(file: BinaryIO, count: int) -> bytes:
    """`count` bytes, or fewer at the end of the file."""
    parts, left = [], count
    while left and (part := file.read(left)):
        parts.append(part)
        left -= len(part)
    return b"".join(parts)
