"""What the scheduler says, brought to the front end; another scheduler is told first what the one before knew."""

from __future__ import annotations

import asyncio
import logging
from typing import NoReturn

from engine.errors import InternalError
from engine.ipc import AsyncInbox
from engine.messages import Hello, ToTokenizer
from tokenizer_proc.frontend import Frontend
from tokenizer_proc.upstream.outbox import SchedulerOutbox

log = logging.getLogger(__name__)


class SchedulerInbox:
    """The inbox of one front end."""

    def __init__(self, frontend: Frontend, outbox: SchedulerOutbox, inbox: AsyncInbox[ToTokenizer]) -> None:
        self.frontend = frontend
        self._outbox = outbox
        self._inbox = inbox

    async def until_ready(self, stopping: asyncio.Event, forgiving: bool) -> bool:
        """Reads until requests can be served; False when we are to stop before.

        Raises AdapterError for an adapter of the start that cannot be loaded; `forgiving`, it is only left out: whoever
        takes over serves what is still there.
        """
        stop = asyncio.ensure_future(stopping.wait())
        try:
            while not self.frontend.is_ready:
                message = asyncio.ensure_future(anext(self._inbox))
                await asyncio.wait({stop, message}, return_when=asyncio.FIRST_COMPLETED)
                if not message.done():
                    message.cancel()
                    return False
                self._take(message.result())
                self._look_for_failures(forgiving)
            return True
        finally:
            stop.cancel()

    async def read(self) -> NoReturn:
        """Reads for ever. However many messages there are, the event loop turns after each."""
        async for message in self._inbox:
            self._take(message)
            await asyncio.sleep(0)
        raise InternalError("the inbox ended")

    def _take(self, message: ToTokenizer) -> None:
        if isinstance(message, Hello) and self._outbox.follow(message):
            self.frontend.recover(message.epoch)
        else:
            self.frontend.handle(message)

    def _look_for_failures(self, forgiving: bool) -> None:
        if forgiving:
            for reason in self.frontend.adapters.give_up_failed():
                log.error("%s; it is not served any more", reason)
        elif (failure := self.frontend.adapters.failure) is not None:
            raise failure
