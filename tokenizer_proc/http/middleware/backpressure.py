"""Backpressure: bounds how many bytes may wait for a client to read them, and for how long.

    events --write--> [ write buffer in this process ] --> [ the kernel's buffers ] --> client

Writing never blocks, so a slow client does not block other calls; the bytes that wait for the client are counted. A
client is disconnected if too many bytes wait, or if within `stall_timeout` seconds it reads less than 16 KiB and less
than the bytes that waited when that time began.
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
from tokenizer_proc.http.intake.body_reader import ACCOUNT, UNREAD
from tokenizer_proc.http.intake.memory_budget import MemoryAccount
from tokenizer_proc.http.middleware.access_log import ACCESS_RECORD

FREE_BYTES = 64 << 10  # the number of waiting bytes that are not counted in the memory for requests
LEAST_BYTES = 16 << 10  # the number of bytes that a client must read within the stall timeout, if as many wait
UNBOUNDED = (1 << 31) - 1  # the largest high-water mark that uvloop takes
FIRST_PAUSE, LONGEST_PAUSE = 0.01, 1.0  # seconds between two checks of the buffer while nothing is written


class SlowReader(EngineError):
    """A client does not read its response. The error is only logged, because the client would not read it either."""

    kind = "slow_reader"


class WriteBuffer:
    """Counts the unread bytes of one response. At most `max_buffered` bytes plus the largest write may wait.

    Those beyond FREE_BYTES are counted in `account`.
    """

    def __init__(
        self, transport: asyncio.WriteTransport, max_buffered: int, stall_timeout: float, account: MemoryAccount
    ) -> None:
        transport.set_write_buffer_limits(high=UNBOUNDED)  # this class bounds the buffer instead
        self._transport = transport
        self._account = account
        self._max_buffered, self._stall_timeout = max_buffered, stall_timeout
        self._waiting = self._largest = 0
        self._began, self._due, self._taken = time.monotonic(), 0, 0

    async def write(self, answer: web.StreamResponse, data: bytes) -> None:
        """Writes `data` to the response without blocking. Raises SlowReader if the client reads too slowly."""
        self.check()
        await answer.write(data)
        self._waiting = self._transport.get_write_buffer_size()
        self._largest = max(self._largest, len(data))
        self._count()

    async def finish(self, answer: web.StreamResponse, request: web.Request) -> None:
        """Ends the response and waits until all its bytes are read. Raises SlowReader for too slow a client."""
        await answer.prepare(request)
        await answer.write_eof()
        self._waiting = self._largest = self._transport.get_write_buffer_size()
        self._count()
        pause = FIRST_PAUSE
        while self._waiting:
            self.check()
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE, self._stall_timeout / 2)

    def check(self) -> None:
        """Counts the bytes read since the last check. Raises SlowReader if too few were read or too many wait."""
        waiting, now = self._transport.get_write_buffer_size(), time.monotonic()
        self._taken += self._waiting - waiting
        self._waiting = waiting
        self._count()
        if waiting > self._max_buffered + self._largest:
            raise SlowReader(f"{waiting} bytes wait to be read")
        if not waiting or self._taken >= self._due:
            self._began, self._due, self._taken = now, min(waiting, LEAST_BYTES), 0
        elif now - self._began > self._stall_timeout:
            raise SlowReader(f"of {waiting} bytes {self._taken} were read in {now - self._began:.1f} seconds")

    def _count(self) -> None:
        try:
            self._account.set(UNREAD, max(0, self._waiting - FREE_BYTES))
        except EngineError as error:
            raise SlowReader(f"{self._waiting} bytes wait to be read, and {error.message}") from error

    def cut(self, request: web.Request, error: SlowReader) -> None:
        """Closes the connection at once, and drops the waiting bytes, including those in the kernel (SO_LINGER 0).

        `error` goes to the access log.
        """
        request[ACCESS_RECORD].cause = error
        sock = self._transport.get_extra_info("socket")
        if sock is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._transport.abort()


WRITE_BUFFER = web.RequestKey("buffer", WriteBuffer)
"""The key under which a request stores its WriteBuffer."""


def middleware(max_buffered: int, stall_timeout: float) -> Middleware:
    """Returns the middleware that applies these bounds to every response."""

    @web.middleware
    async def bound_answer(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.transport is None:
            raise ConnectionResetError("the client disconnected")
        transport = cast(asyncio.WriteTransport, request.transport)
        buffer = request[WRITE_BUFFER] = WriteBuffer(transport, max_buffered, stall_timeout, request[ACCOUNT])
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
