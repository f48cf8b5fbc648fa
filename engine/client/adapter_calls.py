"""The adapter calls of an engine, over one thing: sending a Command. Engine and FakeEngine share them.

A LoRARequest whose adapter is not there loads it; those who ask at the same time wait for one load. What its name
means is asked every time, for others may have moved or unloaded it.
Knows nothing of sockets.
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
    """Load, unload, pin, list."""

    def __init__(self) -> None:
        self._loading: dict[tuple[str, str], asyncio.Task[None]] = {}

    @abstractmethod
    async def _command(self, call: CommandName, **fields: Any) -> Answer:
        """The answer to one Command."""

    async def load_lora_adapter(
        self, lora_name: str, lora_path: str, pinned: bool = False, preload: bool = False, load_inplace: bool = False
    ) -> AdapterCard:
        """Loads an adapter from a directory or hub id: until it can be named, with `preload` until it is resident.

        With `load_inplace` a name that is taken is re-pointed, at once; requests in flight finish on what they began
        with. Raises NotFound where there is no adapter, InvalidRequest for one that cannot be served.
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
        """Takes the name at once; returns when its memory is free, or after a minute if its requests still run.

        Raises NotFound.
        """
        await self._command("unload", lora_name=lora_name)

    async def pin_lora_adapter(self, lora_name: str) -> AdapterCard:
        """Keeps an adapter in memory for good. Raises NotFound, and InvalidRequest when no more may be pinned."""
        return (await self._command("pin", lora_name=lora_name)).adapters[0]

    async def unpin_lora_adapter(self, lora_name: str) -> AdapterCard:
        """Lets an adapter give way to others again. Raises NotFound."""
        return (await self._command("unpin", lora_name=lora_name)).adapters[0]

    async def adapters(self) -> list[AdapterCard]:
        """The adapters that can be named, and those that drain, with what is known of each."""
        return (await self._command("list")).adapters

    async def _first_use(self, lora: LoRARequest) -> None:
        """Makes sure that the request's name means its path. Raises InvalidRequest when it means another one."""
        key = (lora.lora_name, lora.lora_path)
        task = self._loading.get(key)
        if task is None:
            task = self._loading[key] = asyncio.ensure_future(self._find_or_load(lora))
            task.add_done_callback(lambda done: self._ended(key, done))
        await asyncio.shield(task)

    def _ended(self, key: tuple[str, str], task: asyncio.Task[None]) -> None:
        del self._loading[key]
        if not task.cancelled():
            task.exception()  # was told to whoever still waited

    async def _find_or_load(self, lora: LoRARequest) -> None:
        if await self._is_loaded(lora):
            return
        try:
            await self._command("load", lora_name=lora.lora_name, lora_path=lora.lora_path)
        except InvalidRequest as error:
            if error.code != "adapter_already_loaded" or not await self._is_loaded(lora):
                raise  # else another host was faster

    async def _is_loaded(self, lora: LoRARequest) -> bool:
        told = (await self._command("list", lora_name=lora.lora_name)).adapters
        cards = [card for card in told if card.name == lora.lora_name and card.state != "draining"]
        if not cards:
            return False
        if lora.lora_path not in (cards[0].path, cards[0].root):
            raise InvalidRequest(
                f"adapter {lora.lora_name} is loaded from {cards[0].path}, not from {lora.lora_path}",
                param="lora_path",
            )
        return True


def not_found(name: str) -> NotFound:
    """For a name that means nothing."""
    return NotFound(f"no adapter is called {name}", param="lora", code="model_not_found")
