"""Reads text files of model and adapter directories: regular files of bounded size, of one open directory.

A pipe does not block the reader, and at most the bound is read. Knows nothing of the files' meaning.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from engine.directory import Directory, FileMissing, FileRefused
from engine.errors import ConfigError

MAX_TOKENIZER = 64 << 20
MAX_CONFIG = 16 << 20
MAX_TEMPLATE = 1 << 20


@contextlib.contextmanager
def open_directory(path: str | Path, roots: Sequence[str] = ()) -> Iterator[Directory | None]:
    """The directory, with files under `roots` only if there are any; None if there is none. Raises ConfigError."""
    directory = _opened(path, roots)
    with directory or contextlib.nullcontext():
        yield directory


def read(directory: Directory, name: str, limit: int) -> bytes | None:
    """The file's bytes; None if there is none. Raises ConfigError if it is larger than `limit`, or may not be read."""
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
