"""Finds the local directory behind a path or a hub id, if it may be read. In threads, a few at a time.

Knows nothing of the files' content, nor of callers.
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
from engine.directory import real_path
from engine.errors import AdapterError, ConfigError, EngineError, NotFound

T = TypeVar("T")

AT_ONCE = 4  # downloads; and, apart from those, reads of local directories
LONGEST_PATH = 4096
CONFIG_NAME = "adapter_config.json"

_LOCAL = re.compile(r"[/~.]")  # a hub id does not begin so


class Sources:
    """Finds directories. With `allowed` roots every file that is read must lie under one.

    Whoever reads the files checks that again, as they may be swapped meanwhile.
    """

    def __init__(self, allowed: Sequence[str] = ()) -> None:
        self.allowed = list(allowed)
        self._disk = asyncio.Semaphore(AT_ONCE)
        self._downloads = asyncio.Semaphore(AT_ONCE)  # apart, so that a hanging download does not block local reads

    async def find(self, name: str, path: str) -> str:
        """The directory behind `path`, for the adapter `name`; a hub id is downloaded.

        Raises NotFound when there is no adapter, AdapterError when it may not be read.
        """
        local = await _in_thread(self._disk, lambda: _local(name, path, self.allowed))
        if local is not None:
            return local
        return await _in_thread(self._downloads, lambda: _checked(name, path, self.allowed))

    async def below(self, root: str, name: str) -> str | None:
        """The directory `name` right under `root`, if there is one. Raises AdapterError if it is a link out of it."""
        return await _in_thread(self._disk, lambda: _below(root, name))

    async def read(self, work: Callable[[], T]) -> T:
        """Runs `work`, which reads files of a directory that was found, in a thread."""
        return await _in_thread(self._disk, work)


async def _in_thread(slots: asyncio.Semaphore, work: Callable[[], T]) -> T:
    """Runs `work` in a daemon thread, which does not keep the process from ending if it hangs."""
    async with slots:
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        outcome: concurrent.futures.Future[T] = concurrent.futures.Future()

        def run() -> None:
            try:
                outcome.set_result(work())
            except Exception as error:
                outcome.set_exception(error)
            with contextlib.suppress(RuntimeError):  # the event loop is closed
                loop.call_soon_threadsafe(ended.set)

        threading.Thread(target=run, name="adapter source", daemon=True).start()
        await ended.wait()
        return outcome.result()


def _local(name: str, path: str, allowed: Sequence[str]) -> str | None:
    """The directory at a path; None when it can only be a hub id."""
    what = f"adapter `{name}`"
    if len(path) > LONGEST_PATH or "\0" in path:
        raise AdapterError(f"{what}: this is no path", param="lora_path")
    try:
        local = Path(path).expanduser()
        is_path = _LOCAL.match(path) is not None or local.exists()
        if is_path:
            lora_roots.check_path(local, allowed, what)  # first: a directory outside of the roots is not even opened
        if local.is_file():
            raise AdapterError(f"{what}: {path} is a file; give the directory that holds it", param="lora_path")
    except ConfigError as error:
        raise AdapterError(error.message, param="lora_path") from error
    except (OSError, RuntimeError) as error:  # a name that is too long, the home of an unknown user
        reason = error.strerror if isinstance(error, OSError) else error
        raise AdapterError(f"{what}: the path cannot be used ({reason})", param="lora_path") from error
    return _checked(name, path, allowed) if is_path else None


def _checked(name: str, path: str, allowed: Sequence[str]) -> str:
    """The checked directory behind a path or a hub id; a hub id is downloaded."""
    what = f"adapter `{name}`"
    try:
        directory = hub.local_directory(path, what)
    except ConfigError as error:
        raise _nothing(name, path, error.message) from error
    try:
        names = lora_roots.check_files(directory, allowed, what)
    except ConfigError as error:
        raise AdapterError(error.message, param="lora_path") from error
    if CONFIG_NAME not in names:
        raise _nothing(name, path, f"there is no {CONFIG_NAME} in it")
    return str(directory)


def _below(root: str, name: str) -> str | None:
    path = os.path.join(root, name)
    if not os.path.isdir(path):
        return None
    if os.path.dirname(real_path(path)) != root:
        raise AdapterError(f"adapter `{name}`: it lies outside of --lora-resolve-root", param="lora_path")
    return path


def _nothing(name: str, path: str, reason: str) -> EngineError:
    """Worded as vLLM does, because its clients match the text."""
    return NotFound(f"Loading lora {name} failed: No adapter found for {path} ({reason})", param="lora_path")
