"""Runs the tokenizer process: its sockets and servers, and the order in which they open and close.

open     inbox -> Hello -> Capacity -> adapters loaded -> HTTP and ZeroMQ servers -> Ready
close    the launcher asks -> no new connections -> open streams end, or are cancelled after DRAIN_SECONDS -> exit 0
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
from collections.abc import AsyncIterator
from typing import NoReturn

import zmq
import zmq.asyncio

from engine.config.process_configs import TokenizerConfig
from engine.ipc import AsyncInbox
from engine.messages import ToTokenizer
from engine.processes.busy_timer import BusyTimer
from engine.processes.child import Child
from tokenizer_proc.frontend import Frontend
from tokenizer_proc.http.server import http_server
from tokenizer_proc.inbox import SchedulerInbox
from tokenizer_proc.upstream.outbox import SchedulerOutbox
from tokenizer_proc.zmq_server import ZmqServer

M_MMAP_THRESHOLD = -3  # a parameter of glibc's mallopt
DRAIN_SECONDS = 10.0
BEAT_SECONDS = 0.5


async def serve(child: Child, config: TokenizerConfig, busy_timer: BusyTimer) -> None:
    """Runs the process until it is asked to stop. Raises EngineError if it cannot start.

    `busy_timer` is idle while this process waits for the scheduler. Once it serves, the timer is ticked regularly, to
    show that the event loop is not blocked.
    """
    stopping, loop = asyncio.Event(), asyncio.get_running_loop()
    child.on_stop = lambda: loop.call_soon_threadsafe(stopping.set)
    context = zmq.asyncio.Context()
    inbox: AsyncInbox[ToTokenizer] = AsyncInbox(
        context, config.endpoints.tokenizer, ToTokenizer, config.endpoints.max_frame_bytes
    )
    outbox = SchedulerOutbox(zmq.Context.shadow(context.underlying), config.endpoints)
    try:
        messages = SchedulerInbox(Frontend.load(config, outbox.send), outbox, inbox)
        if not await messages.until_ready(stopping, config.endpoints.epoch > 0, busy_timer):
            return
        await _run_servers(child, config, context, messages, stopping, busy_timer)
    finally:
        inbox.close()
        outbox.close()
        context.term()


async def _run_servers(
    child: Child,
    config: TokenizerConfig,
    context: zmq.asyncio.Context,
    messages: SchedulerInbox,
    stopping: asyncio.Event,
    busy_timer: BusyTimer,
) -> None:
    """Runs both servers, from when the front end is ready until its last stream has ended after a request to stop."""
    frontend, reading = messages.frontend, asyncio.ensure_future(messages.read())
    beating = asyncio.ensure_future(_beat(busy_timer))
    try:
        async with _zmq_server(config, context, frontend) as serving, http_server(config, frontend) as http:
            _spare_collections()
            _map_large_blocks()
            child.ready(_facts(frontend))
            child.start_heartbeat(busy_timer)
            ended = asyncio.ensure_future(stopping.wait())
            await asyncio.wait((ended, reading, serving), return_when=asyncio.FIRST_COMPLETED)
            ended.cancel()
            for task in (reading, serving):
                if task.done():
                    task.result()  # raises the error that ended the task
            await http.stop_listening()
            await frontend.drain(DRAIN_SECONDS)
    finally:
        beating.cancel()
        reading.cancel()


def _spare_collections() -> None:
    """Keeps the garbage collector from visiting what was loaded at start, and from running while a body is decoded.

    With Python's own threshold, of 700 objects, a body of 65,000 lists takes ten times as long to decode.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)


def _map_large_blocks() -> None:
    """Makes glibc map each block of a MiB or more by itself: it grows without a copy, and is given back when freed.

    Otherwise the bodies that grow side by side leave holes, and the process takes twice the memory that they need.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 20)


async def _beat(busy_timer: BusyTimer) -> NoReturn:
    """Ticks `busy_timer` every BEAT_SECONDS, which shows the launcher that the event loop is not blocked."""
    while True:
        busy_timer.tick()
        await asyncio.sleep(BEAT_SECONDS)


@contextlib.asynccontextmanager
async def _zmq_server(
    config: TokenizerConfig, context: zmq.asyncio.Context, frontend: Frontend
) -> AsyncIterator[asyncio.Future[None]]:
    """Runs the ZeroMQ server while entered. Yields its task."""
    server = ZmqServer(context, config.endpoints.zmq_server, frontend, config.endpoints.max_frame_bytes)
    task = asyncio.ensure_future(server.serve())
    try:
        yield task
    finally:
        task.cancel()
        server.close()


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
