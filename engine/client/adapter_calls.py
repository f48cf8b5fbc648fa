"""The adapter calls that Engine and FakeEngine share, built on one abstract method that sends a Command.

A request with a LoRARequest whose adapter is not loaded loads it first; concurrent calls with the same LoRARequest wait
for one load. Each call asks the engine which adapter the name refers to, because other clients may load and unload
adapters too.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from typing import Any, Literal

from engine.client.lora_request import LoRARequest
from engine.errors import InvalidRequest, NotFound
from engine.messages import AdapterCard, Answer

CommandName = Literal["load", "unload", "pin", "unpin", "list", "info"]


class AdapterCalls(ABC):
    """Base class of Engine and FakeEngine: loads, unloads, pins and lists adapters."""

    def __init__(self) -> None:
        self._loading: dict[tuple[str, str], asyncio.Task[None]] = {}

    @abstractmethod
    async def _command(self, call: CommandName, **fields: Any) -> Answer:
        """Sends one Command and returns the engine's Answer."""

    async def load_lora_adapter(
        self, lora_name: str, lora_path: str, pinned: bool = False, preload: bool = False, load_inplace: bool = False
    ) -> AdapterCard:
        """Loads an adapter from a directory or hub id. Returns when the adapter can be used; with `preload`, when it is
        resident.

        With `load_inplace` a name in use is pointed at the new files; requests in flight finish with the old ones.
        Raises NotFound where there is no adapter, InvalidRequest for one that cannot be served.
        """
        answer = await self._command(
            "load",
            lora_name=lora_name,
            lora_path=lora_path,
            pinned=pinned,
            preload=preload,
            load_inplace=load_inplace,
        )
        return answer.adapters[0]

    async def unload_lora_adapter(self, lora_name: str) -> None:
        """Removes the name at once. Returns when the adapter's memory is free, or after a minute if requests still run.

        Raises NotFound if no adapter has this name.
        """
        await self._command("unload", lora_name=lora_name)

    async def pin_lora_adapter(self, lora_name: str) -> AdapterCard:
        """Keeps an adapter in memory until it is unpinned. Raises NotFound, or InvalidRequest at the limit of pins."""
        return (await self._command("pin", lora_name=lora_name)).adapters[0]

    async def unpin_lora_adapter(self, lora_name: str) -> AdapterCard:
        """Allows the adapter to be evicted again. Raises NotFound."""
        return (await self._command("unpin", lora_name=lora_name)).adapters[0]

    async def adapters(self) -> list[AdapterCard]:
        """Returns the adapters that have a name, and those that are draining."""
        return (await self._command("list")).adapters

    async def _first_use(self, lora: LoRARequest) -> None:
        """Loads the adapter unless it is loaded. Raises InvalidRequest if the name is loaded from another path."""
        key = (lora.lora_name, lora.lora_path)
        task = self._loading.get(key)
        if task is None:
            task = self._loading[key] = asyncio.ensure_future(self._find_or_load(lora))
            task.add_done_callback(lambda done: self._ended(key, done))
        await asyncio.shield(task)

    def _ended(self, key: tuple[str, str], task: asyncio.Task[None]) -> None:
        del self._loading[key]
        if not task.cancelled():
            task.exception()  # marks it as retrieved: all callers may have been cancelled

    async def _find_or_load(self, lora: LoRARequest) -> None:
        if await self._is_loaded(lora):
            return
        try:
            await self._command("load", lora_name=lora.lora_name, lora_path=lora.lora_path)
        except InvalidRequest as error:
            if error.code != "adapter_already_loaded" or not await self._is_loaded(lora):
                raise  # else another client has loaded the same adapter meanwhile

    async def _is_loaded(self, lora: LoRARequest) -> bool:
        listed = (await self._command("list", lora_name=lora.lora_name)).adapters
        cards = [card for card in listed if card.name == lora.lora_name and card.state != "draining"]
        if not cards:
            return False
        if lora.lora_path not in (cards[0].path, cards[0].root):
            raise InvalidRequest(
                f"adapter {lora.lora_name} is loaded from {cards[0].path}, not from {lora.lora_path}",
                param="lora_path",
            )
        return True


def not_found(name: str) -> NotFound:
    """Returns the error for a name that no adapter has."""
    return NotFound(f"no adapter is called {name}", param="lora", code="model_not_found")
