"""Runs the open calls that change adapters: how many there may be, and what becomes of one whose caller has left.

waiting, finding, downloading    caller leaves --> the call is dropped
begun                            caller leaves --> the call goes on to its end
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from engine.errors import EngineDead, Overloaded

T = TypeVar("T")
log = logging.getLogger(__name__)

CALLS_AT_ONCE = 1024


class Call:
    """One open call. It sets `has_begun` when it is about to change something outside of itself."""

    def __init__(self) -> None:
        self.has_begun = False


class AdapterCalls:
    """The open calls of one front end, each in a task of its own."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closed = False

    def __len__(self) -> int:
        return len(self._tasks)

    async def run(self, work: Callable[[Call], Coroutine[Any, Any, T]]) -> T:
        """Runs `work` and returns its result. A call that has begun goes on if the caller is cancelled.

        Raises Overloaded if the server is shutting down or CALLS_AT_ONCE calls are open.
        """
        if self._closed or len(self._tasks) >= CALLS_AT_ONCE:
            raise Overloaded("the server is shutting down" if self._closed else "too many adapter calls are open")
        call = Call()
        task = asyncio.ensure_future(work(call))
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled():
                raise EngineDead("the server is shutting down") from None
            if not call.has_begun:
                task.cancel()
            raise

    async def close(self) -> None:
        """Refuses new calls, and ends the open ones with EngineDead."""
        self._closed = True
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.info("an adapter call failed: %s", error)
