"""Server-sent events: one write for each batch of events, one error event at most, then the end. Knows no dialect."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncGenerator, Sequence

import msgspec
from aiohttp import web

from engine.errors import EngineError
from tokenizer_proc.api import errors

logger = logging.getLogger(__name__)

_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # proxies must pass every event on at once
}
_DONE = b"data: [DONE]\n\n"


def frame(event: object) -> bytes:
    """One event."""
    return b"data: " + msgspec.json.encode(event) + b"\n\n"


async def respond(request: web.Request, batches: AsyncGenerator[Sequence[object], None]) -> web.StreamResponse:
    """Sends every batch of events with one write, then [DONE]; after an error its event is the last.

    A client that is gone ends it quietly; `batches` is closed before this returns, whatever happens.
    """
    answer = web.StreamResponse(headers=_HEADERS)
    async with contextlib.aclosing(batches):
        try:
            await answer.prepare(request)
            await answer.write(await _send(answer, batches))
            await answer.write_eof()
        except ConnectionResetError:
            logger.debug("the client of %s is gone", request.path)
    return answer


async def _send(answer: web.StreamResponse, batches: AsyncGenerator[Sequence[object], None]) -> bytes:
    """Sends the events and returns the last bytes."""
    try:
        async for events in batches:
            if events:
                await answer.write(b"".join(map(frame, events)))
    except EngineError as error:
        return frame(errors.body(error))
    except ConnectionResetError:
        raise
    except Exception as error:
        return frame(errors.body(errors.internal(error)))
    return _DONE
