"""The state that every route's handler receives: the front end, the config, and the open calls."""

from __future__ import annotations

import asyncio
import time

from aiohttp import web

from engine.config.process_configs import TokenizerConfig
from tokenizer_proc.frontend import Frontend
from tokenizer_proc.http.middleware.access_log import ACCESS_RECORD
from tokenizer_proc.http.open_calls import OpenCalls
from tokenizer_proc.requests.deadline import Deadline


class Service:
    """The state of one HTTP server. `started` is the time of its start in seconds since 1970.

    `probe` generates the token that calls of /health_generate wait for, and returns why it failed.
    """

    def __init__(self, frontend: Frontend, config: TokenizerConfig) -> None:
        self.frontend = frontend
        self.config = config
        self.open = OpenCalls()
        self.started = int(time.time())
        self.probe: asyncio.Task[str | None] | None = None


def deadline_of(service: Service, request: web.Request) -> Deadline:
    """Returns the call's deadline, which counts from the arrival of `request`."""
    return service.frontend.deadline(request[ACCESS_RECORD].arrived)
