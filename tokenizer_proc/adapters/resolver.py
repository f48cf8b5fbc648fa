"""Loads adapters on demand, when a request names one: the directories directly under --lora-resolve-root.

    request names "sql" --> ROOT/sql exists         --> loaded, once for all requests that name it meanwhile
                        --> ROOT/sql does not exist --> unknown, and not looked for again for MISS_SECONDS

At most `most` of these adapters stay loaded: beyond that, the least recently used idle ones are unloaded. `Lifecycle`
does the loading itself.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence

from engine.config.lora_paths import adapter_of
from engine.errors import ConfigError, EngineError, StorageFailed
from engine.lora_roots import allowed_roots
from engine.messages import AdapterMix
from tokenizer_proc.adapters.entry import Entry
from tokenizer_proc.adapters.lifecycle import LONGEST_NAME, Lifecycle, LoadRequest
from tokenizer_proc.adapters.registry import AdapterRegistry
from tokenizer_proc.adapters.sources import Sources

MISS_SECONDS = 5.0
MOST_MISSES = 4096
MOST = 1000
ATTEMPTS = 3


class Resolver:
    """Loads adapters from directories under `root` when requests name them.

    Raises ConfigError if `root` is not a directory. An adapter's files may also lie under one of `roots`.
    """

    def __init__(
        self,
        root: str,
        registry: AdapterRegistry,
        lifecycle: Lifecycle,
        roots: Sequence[str] = (),
    ) -> None:
        self._root = os.path.realpath(os.path.expanduser(root))
        if not os.path.isdir(self._root):
            raise ConfigError(f"--lora-resolve-root {root}: no such directory")
        self._registry = registry
        self._lifecycle = lifecycle
        self._sources = Sources(allowed_roots([self._root, *roots]))
        self.most = MOST
        self.miss_seconds = MISS_SECONDS
        self._used: OrderedDict[str, Entry] = OrderedDict()  # in the order of last use, the least recent first
        for name, path in registry.paths().items():
            if path == os.path.join(self._root, name) and (entry := registry.find(name)) is not None:
                self._used[name] = entry  # a former tokenizer process loaded it on demand
        self._misses: OrderedDict[str, tuple[float, EngineError | None]] = OrderedDict()
        self._loading: dict[str, asyncio.Task[bool]] = {}

    @property
    def loading(self) -> list[str]:
        """The names of the adapters that are being loaded because requests named them."""
        return [*self._loading]

    async def fetch_named(
        self,
        model: str | None,
        *loras: str | AdapterMix | None,
        may_use: Callable[[str], bool] = lambda name: True,
    ) -> None:
        """Loads the unknown adapters that a call names in `model` and `loras`.

        `model` may have the form base:adapter. Only names for which `may_use` returns True are tried. The first name in
        `loras` that cannot be found ends the search, because the call will be refused for it.
        """
        for name in filter(may_use, self._registry.candidates(model, None)):
            await self.fetch(name)
        for lora in loras:
            for name in self._registry.candidates(None, lora):
                if not may_use(name) or not await self.fetch(name):
                    return

    async def fetch(self, name: str) -> bool:
        """Loads an adapter unless its name is known. Returns whether the name is known afterwards.

        Raises the EngineError of a load that failed.
        """
        for _ in range(ATTEMPTS):  # a loaded adapter may be unloaded before this task runs again
            if self._registry.find(name) is not None:
                self.touch([name])
                return True
            if not self._may_exist(name) or self._is_known_miss(name):
                return False
            if not await asyncio.shield(self._task(name)):
                return False
        return False

    def touch(self, names: Sequence[str]) -> None:
        """Marks the adapters as most recently used."""
        for name in names:
            if name in self._used:
                self._used.move_to_end(name)

    def _task(self, name: str) -> asyncio.Task[bool]:
        task = self._loading.get(name)
        if task is None:
            task = self._loading[name] = asyncio.ensure_future(self._load(name))
            task.add_done_callback(lambda done: self._ended(name, done))
        return task

    def _ended(self, name: str, task: asyncio.Task[bool]) -> None:
        del self._loading[name]
        if not task.cancelled():
            task.exception()  # marks the error as retrieved, so that asyncio does not log it if no request waits

    async def _load(self, name: str) -> bool:
        try:
            path = await self._sources.below(self._root, name)
            if path is None:
                self._miss(name, None)
                return False
            entry = await self._lifecycle.load(LoadRequest(name=name, path=path, if_missing=True), self._sources)
        except EngineError as error:
            if error.status < 500:
                self._miss(name, error)
            raise
        if entry.source.path == path:
            self._used[name] = entry
            self._used.move_to_end(name)
            await self._make_room()
        return True

    async def _make_room(self) -> None:
        """Unloads the least recently used idle adapters while more than `most` are loaded.

        Adapters whose names were unloaded or re-pointed by a call do not count.
        """
        for name, entry in list(self._used.items()):
            if self._registry.find(name) is not entry:
                del self._used[name]
        newest = next(reversed(self._used), None)
        for name, entry in list(self._used.items()):
            if len(self._used) <= self.most:
                return
            if not entry.in_flight and not entry.source.pinned and name != newest:
                del self._used[name]
                try:
                    await self._lifecycle.unload(name, entry.source.adapter_id)
                except StorageFailed:
                    self._used[name] = entry
                    return
                except EngineError:
                    continue  # a client's unload call was faster

    def _may_exist(self, name: str) -> bool:
        """Returns whether `name` is valid as an adapter's name and as that of a directory directly under the root."""
        is_adapters = adapter_of(name, self._registry.base_names) == name
        is_directorys = not name.startswith(".") and not {"/", "\\"} & set(name)
        return is_adapters and is_directorys and 0 < len(name) <= LONGEST_NAME and name.isprintable()

    def _miss(self, name: str, error: EngineError | None) -> None:
        self._misses[name] = time.monotonic() + self.miss_seconds, error
        self._misses.move_to_end(name)
        while len(self._misses) > MOST_MISSES:
            self._misses.popitem(last=False)

    def _is_known_miss(self, name: str) -> bool:
        """Returns whether `name` was not found within the last `miss_seconds`.

        If its load failed within that time, raises the same error again.
        """
        until, error = self._misses.get(name, (0.0, None))
        if time.monotonic() >= until:
            self._misses.pop(name, None)
            return False
        if error is not None:
            raise type(error)(error.message, param=error.param, code=error.code)
        return True
