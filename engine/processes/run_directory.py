"""The directory of a launch: its sockets and its journal. A launch that is killed leaves it, and a later one sweeps it.

    /tmp/chorus-<random>/lock     locked (flock) by the launcher for as long as it lives
                         ...

The lock says whether a launch still runs, so its age does not matter. Directories of other users, and those without a
lock file, are left alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from engine.errors import ConfigError

log = logging.getLogger(__name__)

PREFIX = "chorus-"
LOCK = "lock"
MAX_PATH = 63
"""The most bytes of the path that the directory is made in: a socket path has at most 107."""


@contextlib.contextmanager
def run_directory(parents: Sequence[Path] | None = None) -> Iterator[Path]:
    """Yields a new directory (mode 0700) and removes it afterwards, and first those of launches that were killed.

    It is made in the first of `parents` that can be written; by default $TMPDIR, /tmp and /var/tmp. Raises ConfigError
    if there is none.
    """
    directory, descriptor = _create(_default_parents() if parents is None else parents)
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        os.close(descriptor)


def _default_parents() -> list[Path]:
    given = os.environ.get("TMPDIR")
    return list(dict.fromkeys([*([Path(given).absolute()] if given else []), Path("/tmp"), Path("/var/tmp")]))


def _create(parents: Sequence[Path]) -> tuple[Path, int]:
    """Returns a new directory and the descriptor of its lock."""
    failures = []
    for parent in parents:
        _sweep(parent)
        if len(os.fsencode(parent)) > MAX_PATH:
            failures.append(f"{parent} (its path has more than {MAX_PATH} bytes)")
            continue
        try:
            directory = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
            try:
                return directory, lock(directory)
            except BaseException:
                shutil.rmtree(directory, ignore_errors=True)
                raise
        except OSError as error:
            failures.append(f"{parent} ({error.strerror})")
    raise ConfigError(
        f"no directory can be made for the sockets of this launch, neither in {' nor in '.join(failures)}: "
        f"set TMPDIR to a directory that can be written"
    )


def lock(directory: Path) -> int:
    """Makes the lock file of a directory and returns its descriptor. The file gets its name when it is locked already.

    Raises OSError.
    """
    new = directory / f"{LOCK}.new"
    descriptor = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        new.rename(directory / LOCK)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _sweep(parent: Path) -> None:
    """Removes the directories of this user's launches that have ended without removing them."""
    with contextlib.suppress(OSError), os.scandir(parent) as entries:
        for entry in entries:
            if entry.name.startswith(PREFIX):
                with contextlib.suppress(OSError), _abandoned(Path(entry.path)):
                    log.info("%s is removed, which a launch that was killed has left", entry.path)
                    shutil.rmtree(entry.path, ignore_errors=True)


@contextlib.contextmanager
def _abandoned(directory: Path) -> Iterator[None]:
    """Holds the lock of a directory. Raises OSError if it is locked, has no lock, or is not this user's alone."""
    found = os.lstat(directory)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise PermissionError
    descriptor = os.open(directory / LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise PermissionError
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)
