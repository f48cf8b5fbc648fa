"""Reads the scheduler's messages one after the other and passes them to the front end.

When another scheduler takes over, the adapters and all open requests are sent to it first.
"""

from __future__ import annotations

import asyncio
import logging
from typing import NoReturn

from engine.errors import InternalError
from engine.ipc import AsyncInbox
from engine.messages import Hello, ToTokenizer
from engine.processes.busy_timer import BusyTimer
from tokenizer_proc.frontend import Frontend
from tokenizer_proc.upstream.outbox import SchedulerOutbox

log = logging.getLogger(__name__)


class SchedulerInbox:
    """Reads `inbox` for one front end. `outbox` reconnects to each new scheduler that sends a Hello."""

    def __init__(self, frontend: Frontend, outbox: SchedulerOutbox, inbox: AsyncInbox[ToTokenizer]) -> None:
        self.frontend = frontend
        self._outbox = outbox
        self._inbox = inbox

    async def until_ready(self, stopping: asyncio.Event, forgiving: bool, busy_timer: BusyTimer) -> bool:
        """Reads messages until requests can be served. Returns False if `stopping` is set before that, else True.

        Raises AdapterError if a start-up adapter cannot be loaded. With `forgiving`, that adapter is logged instead and
        only its requests are refused: a restarted tokenizer process serves the adapters that still load. Each message
        is a piece of work for `busy_timer`, which is idle between them.
        """
        busy_timer.idle()
        stop = asyncio.ensure_future(stopping.wait())
        try:
            while not self.frontend.is_ready:
                message = asyncio.ensure_future(anext(self._inbox))
                await asyncio.wait({stop, message}, return_when=asyncio.FIRST_COMPLETED)
                if not message.done():
                    message.cancel()
                    return False
                with busy_timer.working():
                    self._handle(message.result())
                    self._check_adapters(forgiving)
            return True
        finally:
            stop.cancel()

    async def read(self) -> NoReturn:
        """Reads messages until cancelled, and yields to the event loop after each one."""
        async for message in self._inbox:
            self._handle(message)
            await asyncio.sleep(0)
        raise InternalError("the inbox ended")

    def _handle(self, message: ToTokenizer) -> None:
        if isinstance(message, Hello) and self._outbox.follow(message):
            self.frontend.recover(message.epoch)
        else:
            self.frontend.handle(message)

    def _check_adapters(self, forgiving: bool) -> None:
        if forgiving:
            for reason in self.frontend.adapters.accept_failed():
                log.error("%s; its requests are refused until it is loaded again", reason)
        elif (failure := self.frontend.adapters.failure) is not None:
            raise failure
