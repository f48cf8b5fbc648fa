"""`Expect: 100-continue`: a client that waits with its body is told to send it once its rights have been checked.

aiohttp answers it before any middleware runs, and counts it as a fault if the client has left by then.
"""

from __future__ import annotations

import contextlib

from aiohttp import web
from aiohttp.http import HttpVersion11
from aiohttp.typedefs import Handler

from engine.errors import InvalidRequest

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


async def later(_: web.Request) -> None:
    """Leaves the header to the middleware; for aiohttp's routes."""


@web.middleware
async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Asks for the body, or raises InvalidRequest for an expectation that is unknown."""
    expected = request.headers.get("Expect", "").lower()
    if expected and request.version >= HttpVersion11:
        if expected != "100-continue":
            raise InvalidRequest("the Expect header can be 100-continue only")
        with contextlib.suppress(ConnectionResetError):  # the client has left, as the handler will find
            await request.writer.write(CONTINUE)
            request.writer.output_size = 0  # aiohttp: no part of the answer has been sent
    return await handler(request)
