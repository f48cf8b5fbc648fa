"""Server-sent events: one write for each batch of events, and at the end [DONE] or an error event."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Iterator, Sequence

import msgspec
from aiohttp import web

from engine.errors import EngineError
from tokenizer_proc.http.intake.connection import Connection
from tokenizer_proc.http.middleware import errors
from tokenizer_proc.http.middleware.access_log import ACCESS_RECORD
from tokenizer_proc.http.middleware.backpressure import WRITE_BUFFER, SlowReader, WriteBuffer

_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # makes proxies pass on every event at once
}
_COMMENT = b":\n\n"
_DONE = b"data: [DONE]\n\n"


def frame(event: object) -> bytes:
    """Returns the bytes of one event."""
    return b"data: " + msgspec.json.encode(event) + b"\n\n"


async def respond(request: web.Request, batches: AsyncGenerator[Sequence[object], None]) -> web.StreamResponse:
    """Sends each batch of events with one write, then [DONE], or an error event if `batches` raises.

    Returns the response. If the client disconnects, the stream ends without an error; a client that reads too slowly is
    disconnected. In any case `batches` is closed before this returns.
    """
    answer, buffer = web.StreamResponse(headers=_HEADERS), request[WRITE_BUFFER]
    async with contextlib.aclosing(batches):
        try:
            await answer.prepare(request)
            with _commented(request, answer):
                await buffer.write(answer, await _send(answer, buffer, batches))
        except SlowReader as error:
            buffer.cut(request, error)
        except ConnectionResetError:
            request[ACCESS_RECORD].facts["end"] = "gone"
    return answer


async def _send(
    answer: web.StreamResponse, buffer: WriteBuffer, batches: AsyncGenerator[Sequence[object], None]
) -> bytes:
    """Sends the events. Returns the last frame to send: [DONE], or the event of the error that `batches` raised."""
    try:
        async for events in batches:
            if events:
                await buffer.write(answer, b"".join(map(frame, events)))
    except (SlowReader, ConnectionResetError):
        raise
    except Exception as error:
        cause = error if isinstance(error, EngineError) else errors.internal(error)
        answer[errors.CAUSE] = cause
        return frame(errors.body(cause))
    return _DONE


@contextlib.contextmanager
def _commented(request: web.Request, answer: web.StreamResponse) -> Iterator[None]:
    """While entered, a client that half-closes its connection is sent a comment, to find out whether it is gone."""
    connection = request.protocol
    if not isinstance(connection, Connection):
        yield
        return
    tasks: list[asyncio.Task[None]] = []
    connection.on_half_close = lambda: tasks.append(asyncio.ensure_future(_comment(answer)))
    try:
        yield
    finally:
        connection.on_half_close = None
        for task in tasks:  # one that has not begun would write after the end
            task.cancel()


async def _comment(answer: web.StreamResponse) -> None:
    with contextlib.suppress(ConnectionResetError):
        await answer.write(_COMMENT)
