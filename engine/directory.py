"""An open directory of an adapter or a model: its files are opened relative to its handle, and only under the roots.

    Directory("/srv/adapters/sql", roots=["/srv/adapters"]).open("adapter_config.json")
      name    --> O_PATH handle: links are followed, but nothing is read, and no device or pipe is opened
      handle  --> a regular file, under a root by its path in /proc/self/fd?           no: FileRefused
              --> opened for reading through the handle

The check and the read use the same handle, so the file that is read is the file that was checked, even if a link or a
directory is swapped meanwhile. All files of an adapter come from one directory, even if its path is swapped between two
reads.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from engine.errors import AdapterError, EngineError, StorageFailed, is_server_fault

LFS_MARK = b"version https://git-lfs.github.com/spec/"
LFS_BYTES = 1024
"""The largest size of a Git-LFS pointer; they have about 130 bytes."""

CLOSED = -1
"""The value of the handle of a closed directory; no file can be opened relative to it."""


class FileRefused(AdapterError):
    """A file or directory is refused. The message is its name and the `reason`."""

    def __init__(self, path: Path, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.path = path
        self.reason = reason


class PointerInstead(FileRefused):
    """The file is a Git-LFS pointer: the content was not fetched."""


class FileMissing(FileRefused):
    """The file or directory does not exist."""


class Directory:
    """The directory at `path`, held open until `close`, together with all files that were opened in it.

    `roots` are real paths; unless it is empty, the real paths of the directory and of its files must lie under one of
    them. Raises FileRefused, as all calls do, and StorageFailed if the server's disk or descriptors are at fault.
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
        """Closes the directory and the files that were opened in it."""
        self._opened.close()
        if self._handle != CLOSED:
            os.close(self._handle)
            self._handle = CLOSED

    def names(self) -> list[str]:
        """Returns the names of the directory's entries, sorted."""
        try:
            descriptor = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self._handle)
        except OSError as error:
            raise self._unreadable(str(self.path), error) from error
        try:
            return sorted(os.listdir(descriptor))
        finally:
            os.close(descriptor)

    def check(self, name: str) -> None:
        """Raises FileRefused if `open` would refuse `name`."""
        os.close(self._locate(name))

    def has(self, name: str) -> bool:
        """Returns whether there is a file `name` that may be read."""
        try:
            self.check(name)
        except FileRefused:
            return False
        return True

    def open(self, name: str) -> BinaryIO:
        """Opens the regular file `name`, unbuffered; it is closed with the directory."""
        return self._opened.enter_context(self._open(name))

    def read(self, name: str, limit: int) -> bytes:
        """Returns the content of the regular file `name`, which may have at most `limit` bytes."""
        with self._open(name) as file:
            try:
                if os.fstat(file.fileno()).st_size <= limit:
                    data = read_exactly(file, limit + 1)
                    if len(data) <= limit:
                        return data
            except OSError as error:
                raise self._unreadable(name, error) from error
        raise self._refused(name, f"more than {limit >> 20} MiB")

    def _open(self, name: str) -> BinaryIO:
        handle = self._locate(name)
        try:
            flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
            file = os.fdopen(os.open(f"/proc/self/fd/{handle}", flags), "rb", buffering=0)
        except OSError as error:
            raise self._unreadable(name, error) from error
        finally:
            os.close(handle)
        try:
            is_pointer = is_lfs_pointer(file)
        except OSError as error:
            file.close()
            raise self._unreadable(name, error) from error
        if is_pointer:
            file.close()
            raise PointerInstead(self.path / name, name, lfs_advice(self.path))
        return file

    def _locate(self, name: str) -> int:
        """Returns an O_PATH handle of the regular file that `name` leads to, without opening it for reading."""
        if "/" in name:
            raise self._refused(name, "no name of a file")
        handle = self._handle_of(name)
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise self._refused(name, "no regular file")
        return handle

    def _handle_of(self, name: str, flags: int = 0) -> int:
        """Returns an O_PATH handle of the file or directory that `name` leads to. Outside the roots: FileRefused."""
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

    def _unreadable(self, name: str, error: OSError | ValueError) -> EngineError:
        """Returns the error for a name that could not be opened.

        Outside of the roots the error is the same whether or not the file exists.
        """
        path = self.path / name
        if isinstance(error, ValueError):  # the name contains a NUL or half a surrogate pair
            return self._refused(name, "no name of a file")
        if not lies_under(real_path(path), self._roots):
            return self._outside(name)
        if is_server_fault(error):
            return StorageFailed(f"the server cannot read {path} ({error.strerror})")
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            return FileMissing(path, name, "no such directory" if path == self.path else "not found")
        return self._refused(name, f"cannot be read ({error.strerror})")


def is_lfs_pointer(file: BinaryIO) -> bool:
    """Returns whether the file is a small text that stands for a file in Git-LFS, which was not fetched."""
    small = os.fstat(file.fileno()).st_size <= LFS_BYTES
    return small and os.pread(file.fileno(), len(LFS_MARK), 0) == LFS_MARK


def lfs_advice(directory: str | Path) -> str:
    """Returns what to do with a Git-LFS pointer in `directory`."""
    return f"a Git-LFS pointer in place of the file; fetch it, run: git -C {shlex.quote(str(directory))} lfs pull"


def real_path(path: str | Path) -> str:
    """Returns the path with links resolved, even if nothing exists there; empty if a link vanishes meanwhile."""
    try:
        return os.path.realpath(path)
    except OSError:
        return ""


def lies_under(real: str, roots: Sequence[str]) -> bool:
    """Returns whether the path `real` is one of the roots or under one; True for any path if `roots` is empty."""
    return not roots or any(real == root or real.startswith(root.rstrip(os.sep) + os.sep) for root in roots)


def read_exactly(file: BinaryIO, count: int) -> bytes:
    """Reads and returns `count` bytes, or fewer at the end of the file."""
    parts, left = [], count
    while left and (part := file.read(left)):
        parts.append(part)
        left -= len(part)
    return b"".join(parts)
