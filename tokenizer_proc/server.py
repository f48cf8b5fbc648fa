"""The process: sockets, the doors, and the order in which they open and close.

open     inbox -> Hello -> Capacity -> adapters loaded -> HTTP and door -> Ready
close    SIGTERM -> no new connections -> open streams end, or are cancelled after DRAIN_SECONDS -> exit 0
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import AsyncIterator
from typing import NoReturn

import zmq
import zmq.asyncio
from aiohttp import web

from engine.config.sections import TokenizerConfig
from engine.ipc import AsyncInbox
from engine.messages import ToTokenizer
from engine.processes.child import Child
from engine.processes.pulse import Pulse
from tokenizer_proc.frontend import Frontend
from tokenizer_proc.http.app import create_app
from tokenizer_proc.http.auth import admin
from tokenizer_proc.http.middleware import access_log, errors
from tokenizer_proc.inbox import SchedulerInbox
from tokenizer_proc.upstream.outbox import SchedulerOutbox
from tokenizer_proc.zmq_server import ZmqServer

log = logging.getLogger(__name__)

DRAIN_SECONDS = 10.0
BEAT_SECONDS = 0.5


async def serve(child: Child, config: TokenizerConfig, pulse: Pulse) -> None:
    """Runs until SIGTERM. Raises EngineError when it cannot start. `pulse` shows that the event loop turns."""
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    context = zmq.asyncio.Context()
    inbox: AsyncInbox[ToTokenizer] = AsyncInbox(
        context, config.links.tokenizer, ToTokenizer, config.links.max_frame_bytes
    )
    outbox = SchedulerOutbox(zmq.Context.shadow(context.underlying), config.links)
    beating = asyncio.ensure_future(_beat(pulse))
    try:
        news = SchedulerInbox(Frontend.load(config, outbox.send), outbox, inbox)
        if not await news.until_ready(stopping, forgiving=config.links.epoch > 0):
            return
        await _work(child, config, context, news, stopping, pulse)
    finally:
        beating.cancel()
        inbox.close()
        outbox.close()
        context.term()


async def _work(
    child: Child,
    config: TokenizerConfig,
    context: zmq.asyncio.Context,
    news: SchedulerInbox,
    stopping: asyncio.Event,
    pulse: Pulse,
) -> None:
    """From the first message after the start to the last stream."""
    frontend, reading = news.frontend, asyncio.ensure_future(news.read())
    try:
        async with _door(config, context, frontend) as door, _http(config, frontend) as http:
            child.ready(_facts(frontend))
            child.keep_pulse(pulse)
            ended = asyncio.ensure_future(stopping.wait())
            await asyncio.wait((ended, reading, door), return_when=asyncio.FIRST_COMPLETED)
            ended.cancel()
            for task in (reading, door):
                if task.done():
                    task.result()  # raises what ended it
            await http.stop_listening()
            await frontend.drain(DRAIN_SECONDS)
    finally:
        reading.cancel()


async def _beat(pulse: Pulse) -> NoReturn:
    """Shows that the event loop turns."""
    while True:
        pulse.tick()
        await asyncio.sleep(BEAT_SECONDS)


@contextlib.asynccontextmanager
async def _door(
    config: TokenizerConfig, context: zmq.asyncio.Context, frontend: Frontend
) -> AsyncIterator[asyncio.Future[None]]:
    """The ZeroMQ door, open while entered: the task that serves it."""
    door = ZmqServer(context, config.links.door, frontend, config.links.max_frame_bytes)
    task = asyncio.ensure_future(door.serve())
    try:
        yield task
    finally:
        task.cancel()
        door.close()


class _Http:
    """The HTTP server on the launcher's listening socket; without one there is none."""

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
        """No new connections; open ones go on.

        The launcher has the socket open as well: without a shutdown the kernel would go on taking connections that
        nobody accepts.
        """
        if self._site is not None and self._listener is not None:
            await self._site.stop()
            self._site = None
            with contextlib.suppress(OSError), self._listener:
                self._listener.shutdown(socket.SHUT_RDWR)

    async def close(self) -> None:
        """Ends what is still open."""
        await self.stop_listening()
        if self._runner is not None:
            await self._runner.cleanup()


@contextlib.asynccontextmanager
async def _http(config: TokenizerConfig, frontend: Frontend) -> AsyncIterator[_Http]:
    if config.listen_fd is None:
        yield _Http()
        return
    os.set_inheritable(config.listen_fd, False)
    _warn_of_an_open_door(config)
    logging.getLogger("aiohttp.server").addFilter(errors.is_server_fault)
    runner = web.AppRunner(
        create_app(frontend, config),
        handle_signals=False,
        handler_cancellation=True,  # a client that is gone ends its handler, and so its stream
        shutdown_timeout=1.0,
        access_log=access_log.log,
        access_log_class=access_log.MalformedRequestLogger,
    )
    await runner.setup()
    listener = socket.socket(fileno=config.listen_fd)
    site = web.SockSite(runner, listener.dup())
    await site.start()
    http = _Http(runner, site, listener)
    try:
        yield http
    finally:
        await http.close()


def _warn_of_an_open_door(config: TokenizerConfig) -> None:
    host = admin.bound_host(config)
    if config.enable_lora and config.runtime_loads and config.admin_key is None and not admin.is_loopback(host):
        log.warning("whoever can reach %s may load adapters; an --admin-api-key would keep strangers out", host)


def _facts(frontend: Frontend) -> dict[str, str | int | float | bool | list[str] | None]:
    capacity = frontend.capacity
    assert capacity is not None, "ready comes after capacity"
    return {
        "models": frontend.adapters.base_names,
        "adapters": [card.name for card in frontend.adapters.cards()],
        "device": capacity.device,
        "dtype": capacity.dtype,
        "attention_backend": capacity.attention_backend,
        "lora_backend": capacity.lora_backend,
        "max_lora_rank": capacity.max_lora_rank,
        "lora_targets": capacity.lora_targets,
        "max_length": frontend.max_length,
        "rows": capacity.rows,
        "kv_tokens": capacity.kv_pages * capacity.page_size,
    }
