"""The HTTP server, which runs on a listening socket that the launcher opened."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import AsyncIterator

from aiohttp import web

from engine.config.process_configs import TokenizerConfig
from tokenizer_proc.frontend import Frontend
from tokenizer_proc.http.app import create_app
from tokenizer_proc.http.auth import admin
from tokenizer_proc.http.middleware import access_log, errors

log = logging.getLogger(__name__)


class HttpServer:
    """An aiohttp server. Without arguments there is no server, and the methods do nothing."""

    def __init__(
        self,
        runner: web.AppRunner | None = None,
        site: web.SockSite | None = None,
        listener: socket.socket | None = None,
    ) -> None:
        self._runner = runner
        self._site = site
        self._listener = listener

    async def stop_listening(self) -> None:
        """Refuses new connections; the open ones go on.

        The launcher has the socket open too, so the kernel would go on accepting connections if this process only
        closed it; therefore the socket is shut down.
        """
        if self._site is not None and self._listener is not None:
            await self._site.stop()
            self._site = None
            with contextlib.suppress(OSError), self._listener:
                self._listener.shutdown(socket.SHUT_RDWR)

    async def close(self) -> None:
        """Stops listening, and closes the open connections."""
        await self.stop_listening()
        if self._runner is not None:
            await self._runner.cleanup()


@contextlib.asynccontextmanager
async def http_server(config: TokenizerConfig, frontend: Frontend) -> AsyncIterator[HttpServer]:
    """Serves `frontend` over HTTP while entered, if the config has a listening socket."""
    if config.listen_fd is None:
        yield HttpServer()
        return
    os.set_inheritable(config.listen_fd, False)
    warn_of_open_loads(config)
    logging.getLogger("aiohttp.server").addFilter(errors.is_server_fault)
    runner = web.AppRunner(
        create_app(frontend, config),
        handle_signals=False,
        handler_cancellation=True,  # a client's disconnect cancels the handler, and thereby its stream
        shutdown_timeout=1.0,
        access_log=access_log.log,
        access_log_class=access_log.MalformedRequestLogger,
    )
    await runner.setup()
    listener = socket.socket(fileno=config.listen_fd)
    site = web.SockSite(runner, listener.dup())
    await site.start()
    server = HttpServer(runner, site, listener)
    try:
        yield server
    finally:
        await server.close()


def warn_of_open_loads(config: TokenizerConfig) -> None:
    """Logs a warning if other machines can load adapters without an admin key."""
    host = admin.bound_host(config)
    if config.enable_lora and config.runtime_loads and config.admin_key is None and not admin.is_loopback(host):
        log.warning("every client that can reach %s may load adapters; --admin-api-key restricts that", host)
