"""Where compiled functions are kept between launches: one shared library each, named by all that went into it.

Loading one runs it, so the directory must be ours alone, and a file is taken only as it was written: its last bytes
are the hash of the others. It comes to its place by a rename, so two servers may compile the same at once, and one
that is killed leaves nothing that would be loaded. Knows nothing of what is in a library.
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
from model_runner.compute.kernels.cpu.functions.program import Function
from model_runner.platform.device import CPU_INFO

DIGEST = 32
BUILD = "build-"
BUSY = "busy"
UNUSED_SECONDS = 90 * 86400.0
"""After so long without a use a library is removed: it was for another torch, or another machine."""


class Unsafe(Exception):
    """The directory cannot be used; the message is one line for people."""


def directory() -> Path:
    """The user's own, by the XDG rules. Raises Unsafe where there is no home."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    try:
        root = Path(given) if os.path.isabs(given) else Path.home() / ".cache"
    except RuntimeError as error:
        raise Unsafe(f"compiled functions are kept nowhere ({error}): set XDG_CACHE_HOME") from error
    return root / "chorus" / "compiled"


class Cache:
    """A directory that nobody but this user can write to, made if need be. Raises Unsafe."""

    def __init__(self, root: Path) -> None:
        self.root = root
        try:
            root.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with contextlib.suppress(FileExistsError):
                root.mkdir(mode=0o700)
            found = root.lstat()
        except OSError as error:
            raise Unsafe(f"compiled functions cannot be kept: {error}") from error
        if not stat.S_ISDIR(found.st_mode):
            raise Unsafe(f"{root}: no directory; compiled functions are neither kept nor loaded")
        if found.st_uid != os.geteuid() or found.st_mode & 0o077:
            raise Unsafe(
                f"{root}: code is loaded from there, so it must be this user's and closed to others "
                f"(chmod 700; it is {stat.S_IMODE(found.st_mode):o} of user {found.st_uid}); nothing is compiled"
            )

    def path(self, function: Function) -> Path:
        """The file of a function for this machine and this torch."""
        return self.root / f"{function.name}-{_fingerprint(function)}.so"

    def sound(self, path: Path) -> bool:
        """Whether the file is there as it was sealed, which counts as a use of it; a broken one is removed."""
        try:
            content = path.read_bytes()
            os.utime(path)
        except OSError:
            return False
        if len(content) > DIGEST and hashlib.sha256(content[:-DIGEST]).digest() == content[-DIGEST:]:
            return True
        path.unlink(missing_ok=True)
        return False

    @contextmanager
    def workshop(self) -> Iterator[Path]:
        """A fresh directory below, which is gone afterwards; what nobody needs any more goes first."""
        with (self.root / "lock").open("w") as gate:
            fcntl.flock(gate, fcntl.LOCK_EX)
            self._sweep()
            path = Path(tempfile.mkdtemp(prefix=BUILD, dir=self.root))
            busy = (path / BUSY).open("w")
            fcntl.flock(busy, fcntl.LOCK_EX)
        try:
            with busy:
                yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)

    def _sweep(self) -> None:
        """Removes old libraries, and the workshops whose builder is gone: it held a lock while it lived."""
        for path in self.root.glob("*.so"):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > UNUSED_SECONDS:
                    path.unlink()
        for path in self.root.glob(f"{BUILD}*"):
            try:
                with (path / BUSY).open("r+") as busy:
                    fcntl.flock(busy, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            except OSError:
                pass
            shutil.rmtree(path, ignore_errors=True)


def seal(library: Path, path: Path) -> None:
    """Puts a library in its place, whole or not at all; it must lie on the same file system. An ELF file may have more
    bytes than it speaks of.
    """
    content = library.read_bytes()
    with library.open("ab") as file:
        file.write(hashlib.sha256(content).digest())
        file.flush()
        os.fsync(file.fileno())
    library.chmod(0o600)
    library.replace(path)


def _fingerprint(function: Function) -> str:
    """All that the code depends on: the function, how it is written and compiled, torch, Python, the processor."""
    source = registry.program(function).source
    parts = [
        msgspec.json.encode(function),
        _source(sys.modules[registry.FUNCTIONS[function.name].__module__].__file__),
        *(path.read_bytes() for path in (source, *sorted(source.parent.glob("*.h")))),
        _source(compiler.__file__),
        f"{torch.__version__} {torch.version.git_version} {sys.version} {platform.machine()}".encode(),
        f"{torch.backends.cpu.get_cpu_capability()} {processor()}".encode(),
    ]
    return hashlib.sha256(b"\0".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:32]


def _source(file: str | None) -> bytes:
    return Path(file).read_bytes() if file else b""


def processor() -> str:
    """Its model and what it can, as the system tells."""
    try:
        lines = CPU_INFO.read_text().partition("\n\n")[0].splitlines()
    except OSError:
        return platform.processor()
    kept = ("model name", "flags", "cpu family", "model", "stepping", "Features", "CPU part", "CPU implementer")
    return "\n".join(line for line in lines if line.partition(":")[0].strip() in kept)
