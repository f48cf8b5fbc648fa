"""A connection of the HTTP server: aiohttp's protocol, with limits, deadlines, and answers to half-closed clients.

accepted --> refused with 503 at a limit
         --> a head arrives within the read timeout, or 408
         --> requests, one after another; of a request that is answered early, the rest of the body is dropped
         --> the client closes its side: the answers that it asked for are still sent, then the connection closes
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable
from typing import Any, cast

import msgspec
from aiohttp import StreamReader, web
from aiohttp.http import HttpVersion11

from tokenizer_proc.http.intake.connection_limits import ConnectionLimits

MAX_PIPELINED = 2  # requests that are read before the one in progress is answered
REFUSAL_SECONDS = 1.0  # for which a refused client may read why
MAX_REFUSALS = 64  # connections that are refused with an answer at one time; more are closed without one
FIRST_LOOK, LONGEST_LOOK = 0.02, 1.0  # seconds between two looks at a half-closed connection
TCP_CLOSED = 7  # a state in TCP_INFO: the other side has reset the connection
PROCESSING = b"HTTP/1.1 102 Processing\r\n\r\n"


class Connection(web.RequestHandler):
    """One connection. `limits` counts it while it is open; `refused` are those that are being refused."""

    def __init__(
        self,
        server: web.Server,
        *,
        limits: ConnectionLimits,
        read_timeout: float,
        refused: set[Connection],
        **options: Any,
    ) -> None:
        super().__init__(server, **options)
        self._max_msg_queue_size = MAX_PIPELINED  # aiohttp stops reading at this number
        self._msg_queue_resume_size = MAX_PIPELINED - 1
        self._limits = limits
        self._refused = refused
        self._read_timeout = read_timeout
        self._head_due: float | None = None
        self._is_discarding = False
        self._last_body: StreamReader | None = None
        self._watch: asyncio.Task[None] | None = None
        self.on_half_close: Callable[[], None] | None = None
        """Writes something without meaning into the answer in progress, to find out whether the client is gone."""

    # ------------------------------------------------------------------------------------- called by the event loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Admits the connection, or refuses it."""
        peer = transport.get_extra_info("peername")
        reason = self._limits.enter(self, peer[0] if isinstance(peer, tuple) else None)
        if reason is not None:
            self._refuse(cast(asyncio.Transport, transport), reason)
            return
        self._head_due = self._loop.time() + self._read_timeout
        super().connection_made(transport)

    def data_received(self, data: bytes) -> None:
        """Passes bytes to the parser, unless they belong to a request that has been answered."""
        if self._is_discarding:
            return
        before = self._request_count
        super().data_received(data)
        if self._request_count != before:
            self._head_due = None
            self._last_body = self._messages[-1][1]
        elif data and self._waiter is not None and self._head_due is None:
            self._head_due = self._loop.time() + self._read_timeout

    def eof_received(self) -> bool:  # type: ignore[override]
        """The client will send nothing more. Returns whether the connection stays open for the answers it waits for."""
        if self._is_discarding or not self._owes_answers():
            return False
        self._watch = self._loop.create_task(self._until_answered())
        return True

    def connection_lost(self, exc: BaseException | None) -> None:
        """The connection is closed."""
        self._limits.leave(self)
        self._refused.discard(self)
        if self._watch is not None:
            self._watch.cancel()
        super().connection_lost(exc)

    # ---------------------------------------------------------------------------------------- called by the server

    @property
    def is_idle(self) -> bool:
        """Whether no request is in progress, and no part of one has arrived."""
        return self._waiter is not None and self._head_due is None and not self._messages

    def close_idle(self) -> None:
        """Closes the connection, which is idle."""
        self._limits.leave(self)
        self.force_close()

    def check_head(self, now: float) -> None:
        """Ends the connection with a 408 if the head of a request is overdue at the time `now` of the event loop."""
        if self._head_due is not None and now > self._head_due and self.transport is not None:
            self.transport.write(_answer("408 Request Timeout", "timeout_error", "the request arrives too slowly"))
            self.force_close()

    def discard(self) -> None:
        """Drops what else arrives, and closes the connection after the answer in progress."""
        self._is_discarding = True
        self.keep_alive(False)
        self._resume_transport_reading()

    # ------------------------------------------------------------------------------------------------------ private

    def _refuse(self, transport: asyncio.Transport, reason: str) -> None:
        self._is_discarding = True
        if len(self._refused) >= MAX_REFUSALS:
            transport.abort()
            return
        self._refused.add(self)
        transport.write(_answer("503 Service Unavailable", "overloaded_error", reason, "Retry-After: 1\r\n"))
        with contextlib.suppress(OSError):
            transport.write_eof()  # closing at once could destroy the answer before the client reads it
        self._loop.call_later(REFUSAL_SECONDS, transport.abort)

    def _owes_answers(self) -> bool:
        """Whether a request is in progress or queued, and all have arrived as a whole."""
        is_busy = bool(self._messages) or (self._request_count > 0 and self._waiter is None)
        return is_busy and self._last_body is not None and self._last_body.is_eof()

    async def _until_answered(self) -> None:
        """Closes the half-closed connection when it is answered, or at once when the client turns out to be gone.

        A client that has closed both sides looks the same until something is sent to it. It then resets the connection.
        """
        pause, is_probed = FIRST_LOOK, False
        while self.transport is not None:
            if self._waiter is not None and not self._messages:
                self.force_close()
                return
            is_probed = is_probed or self._probe()
            if is_probed and self._is_reset():
                self.transport.abort()
                return
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_LOOK)

    def _probe(self) -> bool:
        """Sends something that the client ignores. Returns whether it could be sent."""
        request = self._current_request
        if request is None or self.transport is None:
            return False
        if request.writer.output_size:
            if self.on_half_close is not None:
                self.on_half_close()
            return True
        if request.version >= HttpVersion11:
            self.transport.write(PROCESSING)
        return True

    def _is_reset(self) -> bool:
        assert self.transport is not None
        sock = self.transport.get_extra_info("socket")
        try:
            return bool(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == TCP_CLOSED)
        except (OSError, AttributeError):
            return False


async def drop_unread_body(request: web.Request, answer: web.StreamResponse) -> None:
    """Before an answer is sent: if the body has not arrived as a whole, its rest is dropped and never read."""
    if not request.content.is_eof() and isinstance(request.protocol, Connection):
        request.protocol.discard()
        answer.force_close()
        answer.headers["Connection"] = "close"


def _answer(status: str, kind: str, message: str, headers: str = "") -> bytes:
    error = {"error": {"message": message, "type": kind, "param": None, "code": None}}
    body = msgspec.json.encode(error)
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n{headers}"
    return f"{head}Connection: close\r\n\r\n".encode() + body
