"""An open directory of an adapter, or of a model, whose files are opened beneath its handle, and under the roots only.

    Directory("/srv/adapters/sql", roots=["/srv/adapters"]).open("adapter_config.json")
      name    --> O_PATH handle: links are followed, but nothing is read, and no device or pipe is opened
      handle  --> a regular file, under a root by its path in /proc/self/fd?           no: FileRefused
              --> opened for reading through the handle

The path that is checked is that of the file that is read. A link or a directory that is swapped at any moment changes
which file a name leads to, but not which file a handle is. All files of an adapter come from one directory, even if its
path is swapped between them. Knows nothing of formats.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from engine.errors import AdapterError

CLOSED = -1
"""No handle: a name beneath it cannot be opened."""


class FileRefused(AdapterError):
    """A file, or a directory, that is not read. The message is its name and the `reason`."""

    def __init__(self, path: Path, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.path = path
        self.reason = reason


class FileMissing(FileRefused):
    """There is no such file."""


class Directory:
    """The directory at `path`, until it is closed, with all files that were opened in it.

    With `roots`, which are real paths, it and its files must lie under one of them by theirs. Raises FileRefused.
    """

    def __init__(self, path: str | Path, roots: Sequence[str] = ()) -> None:
        self.path = Path(path).absolute()
        self._roots = list(roots)
        self._opened = contextlib.ExitStack()
        self._handle = CLOSED
        self._handle = self._handle_of(str(self.path), os.O_DIRECTORY)

    def __enter__(self) -> Directory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the directory and the files."""
        self._opened.close()
        if self._handle != CLOSED:
            os.close(self._handle)
            self._handle = CLOSED

    def names(self) -> list[str]:
        """What is in it, sorted."""
        try:
            descriptor = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self._handle)
        except OSError as error:
            raise self._unreadable(str(self.path), error) from error
        try:
            return sorted(os.listdir(descriptor))
        finally:
            os.close(descriptor)

    def check(self, name: str) -> None:
        """Raises FileRefused for what `open` would not open."""
        os.close(self._locate(name))

    def has(self, name: str) -> bool:
        """Whether there is a file of this name that may be read."""
        try:
            self.check(name)
        except FileRefused:
            return False
        return True

    def open(self, name: str) -> BinaryIO:
        """The regular file `name`, unbuffered; it is closed with the directory."""
        return self._opened.enter_context(self._open(name))

    def read(self, name: str, limit: int) -> bytes:
        """The content of the regular file `name`, which has at most `limit` bytes."""
        with self._open(name) as file:
            if os.fstat(file.fileno()).st_size <= limit:
                data = read_exactly(file, limit + 1)
                if len(data) <= limit:
                    return data
        raise self._refused(name, f"more than {limit >> 20} MiB")

    def _open(self, name: str) -> BinaryIO:
        handle = self._locate(name)
        try:
            flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
            return os.fdopen(os.open(f"/proc/self/fd/{handle}", flags), "rb", buffering=0)
        except OSError as error:
            raise self._unreadable(name, error) from error
        finally:
            os.close(handle)

    def _locate(self, name: str) -> int:
        """A handle of the regular file that the name leads to now, which does not open it."""
        if "/" in name:
            raise self._refused(name, "no name of a file")
        handle = self._handle_of(name)
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise self._refused(name, "no regular file")
        return handle

    def _handle_of(self, name: str, flags: int = 0) -> int:
        """A handle of what the name leads to, if that lies under a root."""
        try:
            handle = os.open(name, os.O_PATH | os.O_CLOEXEC | flags, dir_fd=self._handle)
        except (OSError, ValueError) as error:
            raise self._unreadable(name, error) from error
        try:
            real = os.readlink(f"/proc/self/fd/{handle}")
        except OSError as error:
            os.close(handle)
            raise self._refused(name, f"cannot be located ({error.strerror})") from error
        if not lies_under(real, self._roots):
            os.close(handle)
            raise self._outside(name)
        return handle

    def _refused(self, name: str, reason: str) -> FileRefused:
        return FileRefused(self.path / name, name, reason)

    def _outside(self, name: str) -> FileRefused:
        return self._refused(name, f"lies outside of --lora-root and the hub cache ({', '.join(self._roots)})")

    def _unreadable(self, name: str, error: OSError | ValueError) -> FileRefused:
        """Why a name could not be opened. What is outside of the roots is not told from what does not exist there."""
        path = self.path / name
        if isinstance(error, ValueError):  # a NUL or half a surrogate pair
            return self._refused(name, "no name of a file")
        if not lies_under(real_path(path), self._roots):
            return self._outside(name)
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            return FileMissing(path, name, "no such directory" if path == self.path else "not found")
        return self._refused(name, f"cannot be read ({error.strerror})")


def real_path(path: str | Path) -> str:
    """The path without links, also of what does not exist; empty where a link vanished while it was followed."""
    try:
        return os.path.realpath(path)
    except OSError:
        return ""


def lies_under(real: str, roots: Sequence[str]) -> bool:
    """Whether a real path is one of the roots or under one. No roots: any path is."""
    return not roots or any(real == root or real.startswith(root.rstrip(os.sep) + os.sep) for root in roots)


def read_exactly(file: BinaryIO, count: int) -> bytes:
    """`count` bytes, or fewer at the end of the file."""
    parts, left = [], count
    while left and (part := file.read(left)):
        parts.append(part)
        left -= len(part)
    return b"".join(parts)
