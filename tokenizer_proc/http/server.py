"""The HTTP server, which runs on a listening socket that the launcher opened."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import AsyncIterator, Callable
from typing import NoReturn

from aiohttp import web

from engine.config.process_configs import TokenizerConfig
from tokenizer_proc.frontend import Frontend
from tokenizer_proc.http.app import create_app
from tokenizer_proc.http.auth import hosts
from tokenizer_proc.http.intake.connection import Connection
from tokenizer_proc.http.intake.connection_limits import ConnectionLimits, allowed_by_files
from tokenizer_proc.http.middleware import access_log, errors

log = logging.getLogger(__name__)


CHECK_SECONDS = 1.0
BACKLOG = 1024  # connections that the kernel accepts before this process does
PIECE_BYTES = 64 << 10  # of a body that wait to be read in one connection; the kernel holds the rest back
LINGERING_SECONDS = 5.0  # for which an answer to a request whose body was not read can be fetched


class HttpServer:
    """A listening server and its connections. Without arguments there is no server, and the methods do nothing."""

    def __init__(
        self,
        runner: web.AppRunner | None = None,
        listening: asyncio.Server | None = None,
        listener: socket.socket | None = None,
        limits: ConnectionLimits | None = None,
    ) -> None:
        self._runner = runner
        self._listening = listening
        self._listener = listener
        self.limits = limits

    async def stop_listening(self) -> None:
        """Refuses new connections; the open ones go on.

        The launcher has the socket open too, so the kernel would go on accepting connections if this process only
        closed it; therefore the socket is shut down.
        """
        if self._listening is not None and self._listener is not None:
            self._listening.close()
            self._listening = None
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
    )
    await runner.setup()
    limits = ConnectionLimits(allowed_by_files(config.max_connections), config.max_connections_per_address)
    listener = socket.socket(fileno=config.listen_fd)
    loop = asyncio.get_running_loop()
    listening = await loop.create_server(
        _connections(runner, limits, config.read_timeout), sock=listener.dup(), backlog=BACKLOG
    )
    server = HttpServer(runner, listening, listener, limits)
    checking = asyncio.ensure_future(_check_heads(limits, min(CHECK_SECONDS, config.read_timeout / 4)))
    try:
        yield server
    finally:
        checking.cancel()
        await server.close()


def _connections(runner: web.AppRunner, limits: ConnectionLimits, read_timeout: float) -> Callable[[], Connection]:
    """Returns the function that makes the protocol of each accepted connection."""
    loop, server, refused = asyncio.get_running_loop(), runner.server, set[Connection]()
    assert server is not None, "the runner is set up"

    def connection() -> Connection:
        return Connection(
            server,
            limits=limits,
            read_timeout=read_timeout,
            refused=refused,
            loop=loop,
            access_log=access_log.log,
            access_log_class=access_log.MalformedRequestLogger,
            read_bufsize=PIECE_BYTES,
            lingering_time=LINGERING_SECONDS,
        )

    return connection


async def _check_heads(limits: ConnectionLimits, seconds: float) -> NoReturn:
    while True:
        await asyncio.sleep(seconds)
        now = asyncio.get_running_loop().time()
        for connection in limits.connections:
            connection.check_head(now)


def warn_of_open_loads(config: TokenizerConfig) -> None:
    """Logs a warning if other machines can load adapters without an admin key."""
    host = hosts.bound_host(config)
    if config.enable_lora and config.runtime_loads and config.admin_key is None and not hosts.is_loopback(host):
        log.warning("every client that can reach %s may load adapters; --admin-api-key restricts that", host)
