"""Reads files of model and adapter directories: only regular files, up to a bound on their size.

A named pipe in such a directory does not block the reader. The files are not parsed here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from engine.directory import Directory, FileMissing, FileRefused
from engine.errors import ConfigError

MAX_TOKENIZER = 64 << 20
MAX_CONFIG = 4 << 20
MAX_GENERATION = 64 << 10
MAX_TEMPLATE = 1 << 20


@contextlib.contextmanager
def open_directory(path: str | Path, roots: Sequence[str] = ()) -> Iterator[Directory | None]:
    """Opens the directory at `path` while entered; yields None if there is no such directory.

    If `roots` is not empty, the directory's files must lie under one of them. Raises ConfigError otherwise.
    """
    directory = _opened(path, roots)
    with directory or contextlib.nullcontext():
        yield directory


def read(directory: Directory, name: str, limit: int) -> bytes | None:
    """Returns the bytes of the file `name`, or None if there is no such file.

    Raises ConfigError if it is larger than `limit` bytes, or may not be read.
    """
    try:
        return directory.read(name, limit)
    except FileMissing:
        return None
    except FileRefused as error:
        raise ConfigError(f"{error.path}: {error.reason}") from error


def _opened(path: str | Path, roots: Sequence[str]) -> Directory | None:
    try:
        return Directory(path, roots)
    except FileMissing:
        return None
    except FileRefused as error:
        raise ConfigError(f"{error.path}: {error.reason}") from error
