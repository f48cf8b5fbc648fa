"""Backpressure: how many bytes may wait for one client to read them, and for how long.

    events --write--> [ write buffer in this process ] --> [ the kernel's buffers ] --> client

Writing never blocks, so a slow client does not block the other calls; the bytes that wait for it are counted. A client
is cut off when too many bytes wait, or when within `stall_timeout` it reads neither what waited at the beginning of
that time nor 16 KiB of it. Knows no dialect.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import time
from typing import cast

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from engine.errors import EngineError
from tokenizer_proc.http.middleware.access_log import ACCESS_RECORD

LEAST_BYTES = 16 << 10  # that a client must read within the stall timeout
UNBOUNDED = (1 << 31) - 1  # the largest high-water mark that uvloop takes
FIRST_PAUSE, LONGEST_PAUSE = 0.01, 1.0  # seconds between two checks of the buffer while nothing is written


class SlowReader(EngineError):
    """A client does not read its answer. The error is logged and not sent, as it would not be read either."""

    kind = "slow_reader"


class WriteBuffer:
    """The unread bytes of one answer. At most `max_buffered` bytes may wait, beside the largest write."""

    def __init__(self, transport: asyncio.WriteTransport, max_buffered: int, stall_timeout: float) -> None:
        transport.set_write_buffer_limits(high=UNBOUNDED)  # this class bounds the buffer instead
        self._transport = transport
        self._max_buffered, self._stall_timeout = max_buffered, stall_timeout
        self._waiting = self._largest = 0
        self._began, self._due, self._taken = time.monotonic(), 0, 0

    async def write(self, answer: web.StreamResponse, data: bytes) -> None:
        """Adds `data` to the buffer. Raises SlowReader if too much waits from before."""
        self.check()
        await answer.write(data)
        self._waiting = self._transport.get_write_buffer_size()
        self._largest = max(self._largest, len(data))

    async def finish(self, answer: web.StreamResponse, request: web.Request) -> None:
        """Ends the answer and waits until all of it is read. Raises SlowReader."""
        await answer.prepare(request)
        await answer.write_eof()
        self._waiting = self._largest = self._transport.get_write_buffer_size()
        pause = FIRST_PAUSE
        while self._waiting:
            self.check()
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE, self._stall_timeout / 2)

    def check(self) -> None:
        """Counts the bytes that were read since the last check. Raises SlowReader if they are too few."""
        waiting, now = self._transport.get_write_buffer_size(), time.monotonic()
        self._taken += self._waiting - waiting
        self._waiting = waiting
        if waiting > self._max_buffered + self._largest:
            raise SlowReader(f"{waiting} bytes wait to be read")
        if not waiting or self._taken >= self._due:
            self._began, self._due, self._taken = now, min(waiting, LEAST_BYTES), 0
        elif now - self._began > self._stall_timeout:
            raise SlowReader(f"of {waiting} bytes {self._taken} were read in {now - self._began:.1f} seconds")

    def cut(self, request: web.Request, error: SlowReader) -> None:
        """Closes the connection and drops the bytes that wait, in the kernel too (SO_LINGER 0)."""
        request[ACCESS_RECORD].cause = error
        sock = self._transport.get_extra_info("socket")
        if sock is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._transport.abort()


WRITE_BUFFER = web.RequestKey("buffer", WriteBuffer)
"""Where a request carries its write buffer."""


def middleware(max_buffered: int, stall_timeout: float) -> Middleware:
    """The middleware that ends every answer within these bounds."""

    @web.middleware
    async def bound_answer(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.transport is None:
            raise ConnectionResetError("the client disconnected")
        transport = cast(asyncio.WriteTransport, request.transport)
        buffer = request[WRITE_BUFFER] = WriteBuffer(transport, max_buffered, stall_timeout)
        answer = await handler(request)
        if isinstance(request[ACCESS_RECORD].cause, SlowReader):
            return answer
        try:
            await buffer.finish(answer, request)
        except SlowReader as error:
            buffer.cut(request, error)
        except ConnectionResetError:
            request[ACCESS_RECORD].facts["end"] = "gone"
        return answer

    return bound_answer
