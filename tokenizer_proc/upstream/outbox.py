"""The outbox to the scheduler, which follows it when another scheduler takes over. Knows nothing of what is sent."""

from __future__ import annotations

import logging
from typing import Any

import zmq

from engine.config.process_configs import Endpoints
from engine.ipc import Outbox
from engine.messages import Hello

log = logging.getLogger(__name__)


class SchedulerOutbox(Outbox):
    """Sends to the scheduler that said Hello last; before the first Hello, to the one of the config."""

    def __init__(self, context: zmq.Context[Any], endpoints: Endpoints) -> None:
        super().__init__(context, endpoints.scheduler, endpoints.max_frame_bytes)
        self.send(Hello("tokenizer", endpoints.epoch, endpoints.tokenizer))

    def follow(self, hello: Hello) -> bool:
        """Whether `hello` comes from a new scheduler; messages go to that one from now on."""
        if hello.inbox == self.address:
            return False
        log.warning("another scheduler is there: it is told of everything that is open")
        self.reconnect(hello.inbox)
        return True
