"""What was written to one client and waits to be taken: how much it may be, and for how long.

    events --write--> [ waits in this process ] --> [ the kernel's buffers ] --> client

Writing never blocks, so whoever does not read holds up nobody, and all that waits for him is counted. A client is cut
off when too many bytes wait, or when in all the time that it has it did not take what waited at its beginning, nor
16 KiB of it. Knows no dialect.
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

LEAST_BYTES = 16 << 10
UNBOUNDED = (1 << 31) - 1  # the highest mark that uvloop takes
FIRST_LOOK, LONGEST_LOOK = 0.01, 1.0  # seconds between two looks at what waits when nothing is written


class SlowReader(EngineError):
    """A client that does not take its answer. It is never told: it would not read that either."""

    kind = "slow_reader"


class WriteBuffer:
    """One answer's way to its client. At most `most` bytes may wait, beside the largest write."""

    def __init__(self, transport: asyncio.WriteTransport, most: int, patience: float) -> None:
        transport.set_write_buffer_limits(high=UNBOUNDED)  # it is for us to say when it is too much
        self._transport = transport
        self._most, self._patience = most, patience
        self._waiting = self._largest = 0
        self._began, self._due, self._taken = time.monotonic(), 0, 0

    async def write(self, answer: web.StreamResponse, data: bytes) -> None:
        """Hands `data` over. Raises SlowReader for what waits from before."""
        self.look()
        await answer.write(data)
        self._waiting = self._transport.get_write_buffer_size()
        self._largest = max(self._largest, len(data))

    async def finish(self, answer: web.StreamResponse, request: web.Request) -> None:
        """Hands over what is left, and waits until everything is taken. Raises SlowReader."""
        await answer.prepare(request)
        await answer.write_eof()
        self._waiting = self._largest = self._transport.get_write_buffer_size()
        pause = FIRST_LOOK
        while self._waiting:
            self.look()
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_LOOK, self._patience / 2)

    def look(self) -> None:
        """Counts what was taken since the last time. Raises SlowReader when that is not enough."""
        waiting, now = self._transport.get_write_buffer_size(), time.monotonic()
        self._taken += self._waiting - waiting
        self._waiting = waiting
        if waiting > self._most + self._largest:
            raise SlowReader(f"{waiting} bytes wait to be read")
        if not waiting or self._taken >= self._due:
            self._began, self._due, self._taken = now, min(waiting, LEAST_BYTES), 0
        elif now - self._began > self._patience:
            raise SlowReader(f"of {waiting} bytes {self._taken} were read in {now - self._began:.1f} seconds")

    def cut(self, request: web.Request, error: SlowReader) -> None:
        """Ends the connection, and forgets what waits: also what waits in the kernel."""
        request[ACCESS_RECORD].cause = error
        sock = self._transport.get_extra_info("socket")
        if sock is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._transport.abort()


WRITE_BUFFER = web.RequestKey("buffer", WriteBuffer)
"""Where a request carries its buffer."""


def bounded(most: int, patience: float) -> Middleware:
    """The middleware that sees every answer off."""

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.transport is None:
            raise ConnectionResetError("the client is gone")
        buffer = request[WRITE_BUFFER] = WriteBuffer(cast(asyncio.WriteTransport, request.transport), most, patience)
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

    return middleware
