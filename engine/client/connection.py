"""The socket from a client program to one engine: sends calls, routes replies by call id, detects a dead engine.

    client                                engine
      | -- Submit 7, Submit 8, Cancel 7 ---->|
      |<-- Delta 8, Delta 7, Failure 7 ------|   each to the queue of its call
      | -- Ping, each second --------------->|   after five seconds of silence the engine aborts the client's requests
      |<-- Ping, in return ------------------|   after ten seconds of silence the engine counts as dead; a Ping with
      |                                      |   another epoch: the engine restarted and the open calls are lost

A reply that cannot be decoded ends its call; a frame without a call id is ignored. An error in the connection itself
ends all calls.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import AsyncIterator, Coroutine
from typing import Any, NoReturn

import msgspec
import zmq
import zmq.asyncio

from engine.errors import EngineDead, InternalError, InvalidRequest, error_from_wire
from engine.ipc import DECODE_ERRORS, MAX_FRAME_BYTES
from engine.messages import Answer, Cancel, Command, Delta, Failure, Ping, Submit, ToClient

log = logging.getLogger(__name__)

PING_SECONDS = 1.0
SILENT_SECONDS = 10.0


class Call:
    """One open call and the queue of its replies."""

    def __init__(self, id: int) -> None:
        self.id = id
        self._replies: asyncio.Queue[Delta | Answer | Failure | EngineDead] = asyncio.Queue()

    def put(self, reply: Delta | Answer | Failure | EngineDead) -> None:
        """Appends a reply."""
        self._replies.put_nowait(reply)

    async def next(self) -> Delta | Answer:
        """Waits for the next reply and returns it. Raises the error that the engine sent, or EngineDead."""
        reply = await self._replies.get()
        if isinstance(reply, EngineDead):
            raise reply
        if isinstance(reply, Failure):
            raise error_from_wire(reply.kind, reply.message, reply.param, reply.code)
        return reply


class Connection:
    """A DEALER socket to one engine. It must be created and closed inside a running event loop."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[ToClient] = msgspec.msgpack.Decoder(ToClient)
        self._calls: dict[int, Call] = {}
        self._ids = itertools.count(1)
        self._context = zmq.asyncio.Context()
        self._socket: zmq.asyncio.Socket = self._context.socket(zmq.DEALER)
        for option in (zmq.SNDHWM, zmq.RCVHWM):
            self._socket.setsockopt(option, 0)
        self._socket.connect(address)
        self._last_heard = asyncio.get_running_loop().time()
        self._epoch: int | None = None
        self._dead: EngineDead | None = None  # set while the engine is silent; the next frame clears it
        self._closed: EngineDead | None = None  # set for good when this connection is closed or failed
        self._tasks = [asyncio.ensure_future(self._run(task)) for task in (self._receive(), self._ping())]

    def new_id(self) -> int:
        """Returns an id that no call of this connection has used."""
        return next(self._ids)

    @contextlib.asynccontextmanager
    async def call(self, message: Submit | Command) -> AsyncIterator[Call]:
        """Sends a call and yields the Call from which to read replies; leaving early or with an exception cancels it.

        Raises InvalidRequest for a message that cannot be encoded or is too large, EngineDead for a dead engine.
        """
        if (gone := self._closed or self._dead) is not None:
            raise gone
        frame = self._encode(message)
        call = self._calls[message.id] = Call(message.id)
        try:
            await self._socket.send(frame)  # there is no high-water mark, so this does not wait
            yield call
        finally:
            del self._calls[message.id]
            if isinstance(message, Submit) and self._closed is None:
                self._socket.send(self._encode(Cancel(message.id)))  # the engine ignores it if the call is finished

    async def close(self) -> None:
        """Closes the connection and ends open calls with EngineDead. Without pings, the engine aborts them."""
        self._closed = EngineDead("the engine was closed")
        self._end_calls(self._closed)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._context.destroy(linger=500)

    def _encode(self, message: Submit | Cancel | Command | Ping) -> bytes:
        """Returns the encoded frame. Refuses one above MAX_FRAME_BYTES: the engine would drop the connection."""
        try:
            frame = self._encoder.encode(message)
        except (OverflowError, UnicodeEncodeError, TypeError, msgspec.MsgspecError) as error:
            raise InvalidRequest(f"this cannot be sent: {error}") from error
        if len(frame) > MAX_FRAME_BYTES:
            raise InvalidRequest(f"a call of {len(frame)} bytes is above the bound of {MAX_FRAME_BYTES}")
        return frame

    async def _run(self, task: Coroutine[Any, Any, NoReturn]) -> None:
        """Runs one of the connection's endless tasks. An exception in the task ends all open calls."""
        try:
            await task
        except Exception as error:
            log.exception("the connection to the engine at %s broke", self._address)
            self._closed = EngineDead(f"the connection to the engine broke: {type(error).__name__}: {error}")
            self._end_calls(self._closed)

    def _end_calls(self, error: EngineDead) -> None:
        """Ends all open calls with an error."""
        for call in self._calls.values():
            call.put(error)

    async def _receive(self) -> NoReturn:
        while True:
            message = self._decode(await self._socket.recv())
            self._last_heard = asyncio.get_running_loop().time()
            self._dead = None
            if message is None:
                continue
            if isinstance(message, Ping):
                self._check_epoch(message.epoch)
            elif message.id in self._calls:  # else the caller has already left the call
                self._calls[message.id].put(message)

    def _decode(self, frame: bytes) -> ToClient | None:
        """Decodes a frame; a reply that cannot be decoded becomes the Failure of its call."""
        try:
            return self._decoder.decode(frame)
        except DECODE_ERRORS as error:
            log.warning("the connection refused a frame of %d bytes: %s", len(frame), error)
            id = _call_id(frame)
            return None if id is None else Failure(id, InternalError.kind, f"an answer cannot be read: {error}")

    def _check_epoch(self, epoch: int) -> None:
        """Ends all open calls if the epoch has changed: a restarted tokenizer process does not know them."""
        if self._epoch is not None and epoch != self._epoch:
            lost = EngineDead("the engine's front end was restarted and this call was lost: send it again")
            self._end_calls(lost)
        self._epoch = epoch

    async def _ping(self) -> NoReturn:
        while True:
            silent = asyncio.get_running_loop().time() - self._last_heard
            if silent > SILENT_SECONDS and self._dead is None:
                self._dead = EngineDead(f"no engine answers at {self._address}")
                self._end_calls(self._dead)
            await self._socket.send(self._encode(Ping()))
            await asyncio.sleep(PING_SECONDS)


def _call_id(frame: bytes) -> int | None:
    """Returns the call id of a reply that cannot be decoded as a message, or None if the frame has no call id."""
    with contextlib.suppress(*DECODE_ERRORS):
        match msgspec.msgpack.decode(frame):
            case ["Delta" | "Answer" | "Failure", int(id), *_] if not isinstance(id, bool):
                return id
    return None
