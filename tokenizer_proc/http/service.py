"""What every route is given: the front end, the config, the open calls; and the facts that a request carries."""

from __future__ import annotations

import time

from aiohttp import web

from engine.config.process_configs import TokenizerConfig
from tokenizer_proc.frontend import Frontend
from tokenizer_proc.http.middleware.access_log import ACCESS_RECORD
from tokenizer_proc.http.open_calls import OpenCalls
from tokenizer_proc.requests.deadline import Deadline


class Service:
    """One HTTP server's state. `started` is in seconds since 1970."""

    def __init__(self, frontend: Frontend, config: TokenizerConfig) -> None:
        self.frontend = frontend
        self.config = config
        self.open = OpenCalls()
        self.started = int(time.time())


def deadline_of(service: Service, request: web.Request) -> Deadline:
    """When this call must be done."""
    return service.frontend.deadline(request[ACCESS_RECORD].arrived)
