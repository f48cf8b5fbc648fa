"""Finds the local directory of an adapter from a path or a hub id, and checks that it may be read.

The work runs in threads, at most AT_ONCE at a time. Files are not parsed here.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import os
import re
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from engine import hub, lora_roots
from engine.adapter_layouts.foreign import describe
from engine.directory import Directory, real_path
from engine.errors import (
    AdapterError,
    ConfigError,
    EngineError,
    NotFound,
    Overloaded,
    StorageFailed,
    TimedOut,
    is_server_fault,
)

T = TypeVar("T")

AT_ONCE = 4  # the largest number of downloads at a time, and, separately, of reads of local directories
MOST_WAITING = 64  # the largest number of downloads that wait for their turn
DOWNLOAD_SECONDS = 1800.0  # the longest time that a call waits for its download
LONGEST_PATH = 4096
CONFIG_NAME = "adapter_config.json"

_LOCAL = re.compile(r"[/~.]")  # first characters of a local path; a hub id begins with none of these


class Sources:
    """Finds adapters' directories. If `allowed` is not empty, every file that is read must lie under one of its roots.

    The code that reads the files repeats this check, because files may be replaced in the meantime.
    """

    def __init__(self, allowed: Sequence[str] = ()) -> None:
        self.allowed = list(allowed)
        self._disk = _Threads()
        self._downloads = _Threads()  # separate, so that a hanging download does not block local reads

    async def find(self, name: str, path: str) -> str:
        """Returns the directory of the adapter `name`, given its `path`: a local path, or a hub id to download.

        Raises NotFound if there is no adapter there, AdapterError if the directory may not be read, StorageFailed if
        that is the server's fault, and Overloaded or TimedOut if too many or too long downloads are under way.
        """
        local = await self._disk.run(lambda: _local(name, path, self.allowed))
        if local is not None:
            return local
        if self._downloads.waiting >= MOST_WAITING:
            raise Overloaded(f"{MOST_WAITING} adapters wait for their download already", retry_after=30.0)
        try:
            async with asyncio.timeout(DOWNLOAD_SECONDS):
                return await self._downloads.run(lambda: _checked(name, path, self.allowed))
        except TimeoutError:
            raise TimedOut(
                f"adapter `{name}`: {path} was not downloaded within {DOWNLOAD_SECONDS / 60:.0f} minutes; what is there"
                " is kept: send the call again, or download it with `hf download`"
            ) from None

    async def below(self, root: str, name: str) -> str | None:
        """Returns the path of the directory `name` directly under `root`, or None if there is no such directory.

        Raises AdapterError if it is a link to a directory elsewhere.
        """
        return await self._disk.run(lambda: _below(root, name))

    async def read(self, work: Callable[[], T]) -> T:
        """Runs `work`, which reads files of an adapter's directory, in a thread. Returns its result."""
        return await self._disk.run(work)


class _Threads:
    """Runs blocking work in daemon threads, AT_ONCE at a time, so that hanging work does not keep the process alive.

    A thread counts until its work has ended, also when its caller has left: work cannot be stopped.
    """

    def __init__(self) -> None:
        self._slots = asyncio.Semaphore(AT_ONCE)
        self.waiting = 0

    async def run(self, work: Callable[[], T]) -> T:
        """Runs `work` when it is its turn. Returns its result or raises its error, or Overloaded without a thread."""
        self.waiting += 1
        try:
            await self._slots.acquire()
        finally:
            self.waiting -= 1
        loop, ended = asyncio.get_running_loop(), asyncio.Event()
        outcome: concurrent.futures.Future[T] = concurrent.futures.Future()

        def end() -> None:
            self._slots.release()
            ended.set()

        def run() -> None:
            try:
                outcome.set_result(work())
            except BaseException as error:  # a panic of a library is no Exception
                outcome.set_exception(error)
            with contextlib.suppress(RuntimeError):  # raised if the event loop is closed
                loop.call_soon_threadsafe(end)

        try:
            threading.Thread(target=run, name="adapter source", daemon=True).start()
        except RuntimeError as error:
            self._slots.release()
            raise Overloaded("the server can start no more threads: try again soon") from error
        await ended.wait()
        return outcome.result()


def _local(name: str, path: str, allowed: Sequence[str]) -> str | None:
    """Returns the checked directory at `path`, or None if `path` can only be a hub id."""
    what = f"adapter `{name}`"
    if len(path) > LONGEST_PATH or "\0" in path:
        raise AdapterError(f"{what}: this is no path", param="lora_path")
    try:
        local = Path(path).expanduser()
        is_path = _LOCAL.match(path) is not None or local.exists()
        if is_path:
            lora_roots.check_path(local, allowed, what)  # comes first: a path outside of the roots is not even opened
        if local.is_file():
            raise AdapterError(f"{what}: {path} is a file; give the directory that holds it", param="lora_path")
    except ConfigError as error:
        raise AdapterError(error.message, param="lora_path") from error
    except (OSError, RuntimeError) as error:  # e.g. the name is too long, or the path is the home of an unknown user
        if is_server_fault(error):
            raise StorageFailed(f"{what}: the server cannot read {path} ({error})") from error
        reason = error.strerror if isinstance(error, OSError) else error
        raise AdapterError(f"{what}: the path cannot be used ({reason})", param="lora_path") from error
    return _checked(name, path, allowed) if is_path else None


def _checked(name: str, path: str, allowed: Sequence[str]) -> str:
    """Returns the directory of a path or a hub id, which it downloads, after checking the directory's files."""
    what = f"adapter `{name}`"
    try:
        directory = hub.local_directory(path, what)
    except ConfigError as error:
        raise _nothing(name, path, error.message.removeprefix(f"{what}: ")) from error
    try:
        names = lora_roots.check_files(directory, allowed, what)
    except ConfigError as error:
        raise AdapterError(error.message, param="lora_path") from error
    if CONFIG_NAME not in names:
        with Directory(directory, allowed) as opened:
            raise _nothing(name, path, describe(opened))
    return str(directory)


def _below(root: str, name: str) -> str | None:
    path = os.path.join(root, name)
    if not os.path.isdir(path):
        return None
    if os.path.dirname(real_path(path)) != root:
        raise AdapterError(f"adapter `{name}`: it lies outside of --lora-resolve-root", param="lora_path")
    return path


def _nothing(name: str, path: str, reason: str) -> EngineError:
    """Returns the NotFound error in vLLM's wording, because vLLM's clients match the text."""
    return NotFound(f"Loading lora {name} failed: No adapter found for {path} ({reason})", param="lora_path")
