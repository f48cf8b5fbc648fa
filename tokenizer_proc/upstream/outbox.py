"""The way to the scheduler, which may be another one tomorrow. Knows nothing of what is sent."""

from __future__ import annotations

import logging
from typing import Any

import msgspec
import zmq

from engine.config.sections import Links
from engine.ipc import Outbox
from engine.messages import Hello

log = logging.getLogger(__name__)


class SchedulerOutbox:
    """An outbox to the scheduler that said Hello last; before any did, to the one of the config."""

    def __init__(self, context: zmq.Context[Any], links: Links) -> None:
        self._context = context
        self._links = links
        self._outbox = Outbox(context, links.scheduler, links.max_frame_bytes)
        self._outbox.send(Hello("tokenizer", links.epoch, links.tokenizer))

    def send(self, message: msgspec.Struct) -> None:
        """Queues one message."""
        self._outbox.send(message)

    def follow(self, hello: Hello) -> bool:
        """Whether this is another scheduler than the one so far: it is written to from now on."""
        if hello.inbox == self._outbox.address:
            return False
        log.warning("another scheduler is there: it is told of everything that is open")
        self._outbox.close()
        self._outbox = Outbox(self._context, hello.inbox, self._links.max_frame_bytes)
        return True

    def close(self) -> None:
        """Drops the socket."""
        self._outbox.close()
