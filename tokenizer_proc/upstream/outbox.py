"""The outbox to the scheduler, which reconnects when another scheduler takes over."""

from __future__ import annotations

import logging
from typing import Any

import zmq

from engine.config.process_configs import Endpoints
from engine.ipc import Outbox
from engine.messages import Hello

log = logging.getLogger(__name__)


class SchedulerOutbox(Outbox):
    """Sends messages to the scheduler that sent the latest Hello; before the first Hello, to the config's address."""

    def __init__(self, context: zmq.Context[Any], endpoints: Endpoints) -> None:
        super().__init__(context, endpoints.scheduler, endpoints.max_frame_bytes)
        self.send(Hello("tokenizer", endpoints.epoch, endpoints.tokenizer))

    def follow(self, hello: Hello) -> bool:
        """Connects to the sender of `hello` if that is a new scheduler. Returns whether it is."""
        if hello.inbox == self.address:
            return False
        log.warning("a new scheduler runs: every open request and every adapter is sent to it again")
        self.reconnect(hello.inbox)
        return True
