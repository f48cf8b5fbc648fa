"""The cache of compiled kernels on disk: a shared library for each, named by a hash of all that the library depends on.

Loading a library runs code in it. So no other user may be able to write to the directory, and each file ends with the
hash of its content, checked before every load. A file enters the cache by a rename: two servers may compile the same
kernel at once, and a killed builder leaves no partial library. Does not depend on what a library computes.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import platform
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import torch

from model_runner.compute.kernels.cpu.compilation import compiler
from model_runner.compute.kernels.cpu.functions import registry
from model_runner.compute.kernels.cpu.functions.spec import KernelKey
from model_runner.platform.device import CPU_INFO

DIGEST_BYTES = 32
BUILD_PREFIX = "build-"
LOCK_FILE = "busy"
"""The name of a file in each build directory, which is locked while the builder of the directory runs."""
UNUSED_SECONDS = 90 * 86400.0
"""The time after which an unused library is removed: it was built for another torch or another machine."""


class UnsafeDirectory(Exception):
    """Raised when the cache directory cannot be used; the message is one line that says why."""


def default_directory() -> Path:
    """Returns Chorus's directory in the user's XDG cache directory. Raises UnsafeDirectory if there is no home."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    try:
        root = Path(given) if os.path.isabs(given) else Path.home() / ".cache"
    except RuntimeError as error:
        raise UnsafeDirectory(f"no directory for compiled kernels ({error}): set XDG_CACHE_HOME") from error
    return root / "chorus" / "compiled"


class KernelCache:
    """The cache directory, which only this user may access; created if missing. Raises UnsafeDirectory if unusable."""

    def __init__(self, root: Path) -> None:
        self.root = root
        try:
            root.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with contextlib.suppress(FileExistsError):
                root.mkdir(mode=0o700)
            found = root.lstat()
        except OSError as error:
            raise UnsafeDirectory(f"compiled kernels cannot be cached: {error}") from error
        if not stat.S_ISDIR(found.st_mode):
            raise UnsafeDirectory(f"{root}: not a directory, so no kernels are compiled")
        if found.st_uid != os.geteuid() or found.st_mode & 0o077:
            raise UnsafeDirectory(
                f"{root}: code is loaded from there, so it must belong to this user and be closed to all others "
                f"(chmod 700; it is {stat.S_IMODE(found.st_mode):o} of user {found.st_uid}); no kernels are compiled"
            )

    def path(self, key: KernelKey) -> Path:
        """Returns the path of a kernel's library, compiled for this machine and this torch."""
        return self.root / f"{key.name}-{_fingerprint(key)}.so"

    def is_intact(self, path: Path) -> bool:
        """Returns whether the file exists and is undamaged. Marks it as used, and removes it if it is damaged."""
        try:
            content = path.read_bytes()
            os.utime(path)
        except OSError:
            return False
        library, digest = content[:-DIGEST_BYTES], content[-DIGEST_BYTES:]
        if library and hashlib.sha256(library).digest() == digest:
            return True
        path.unlink(missing_ok=True)
        return False

    @contextmanager
    def build_directory(self) -> Iterator[Path]:
        """Creates a temporary directory inside the cache, and removes it afterwards.

        Before it is created, unused libraries and the build directories of ended builders are removed.
        """
        with (self.root / "lock").open("w") as cache_lock:
            fcntl.flock(cache_lock, fcntl.LOCK_EX)
            self._remove_unused()
            path = Path(tempfile.mkdtemp(prefix=BUILD_PREFIX, dir=self.root))
            lock = (path / LOCK_FILE).open("w")
            fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            with lock:
                yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)

    def _remove_unused(self) -> None:
        """Removes unused libraries, and the build directories of ended builders, whose lock is free."""
        for path in self.root.glob("*.so"):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > UNUSED_SECONDS:
                    path.unlink()
        for path in self.root.glob(f"{BUILD_PREFIX}*"):
            try:
                with (path / LOCK_FILE).open("r+") as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            except OSError:
                pass
            shutil.rmtree(path, ignore_errors=True)


def install(library: Path, path: Path) -> None:
    """Appends the library's hash to the library and renames it to `path`, which must be on the same file system.

    Loading ignores the hash: an ELF file may have bytes after its sections.
    """
    content = library.read_bytes()
    with library.open("ab") as file:
        file.write(hashlib.sha256(content).digest())
        file.flush()
        os.fsync(file.fileno())
    library.chmod(0o600)
    library.replace(path)


def _fingerprint(key: KernelKey) -> str:
    """Returns a hash of all that a library depends on: key, sources, compiler flags, torch, Python, the processor."""
    source = registry.spec_for(key).source
    parts = [
        msgspec.json.encode(key),
        _read(sys.modules[registry.SPECS[key.name].__module__].__file__),
        *(path.read_bytes() for path in (source, *sorted(source.parent.glob("*.h")))),
        _read(compiler.__file__),
        f"{torch.__version__} {torch.version.git_version} {sys.version} {platform.machine()}".encode(),
        f"{torch.backends.cpu.get_cpu_capability()} {processor()}".encode(),
    ]
    return hashlib.sha256(b"\0".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:32]


def _read(file: str | None) -> bytes:
    return Path(file).read_bytes() if file else b""


def processor() -> str:
    """Returns the processor's model and features, as the system reports them."""
    try:
        lines = CPU_INFO.read_text().partition("\n\n")[0].splitlines()
    except OSError:
        return platform.processor()
    kept = ("model name", "flags", "cpu family", "model", "stepping", "Features", "CPU part", "CPU implementer")
    return "\n".join(line for line in lines if line.partition(":")[0].strip() in kept)
