"""The socket from an embedding host to one engine: sends, routes what comes back by id, and notices silence.

    host                                  engine's door
      | -- Submit 7, Submit 8, Cancel 7 ---->|
      |<-- Delta 8, Delta 7, Failure 7 ------|   each to the queue of its call
      | -- Ping, each second --------------->|   five silent seconds abort the host's requests
      |<-- Ping, in return ------------------|   ten silent seconds: the engine is taken for dead; a Ping of a later
      |                                      |   incarnation: the calls that the former one had are lost

An answer that cannot be decoded ends its call; a frame without a call's id is ignored. A connection that breaks ends
all its calls.
Knows nothing of processes or prompts.
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
    """One open call: what answers it, in order."""

    def __init__(self, id: int) -> None:
        self.id = id
        self._replies: asyncio.Queue[Delta | Answer | Failure | EngineDead] = asyncio.Queue()

    def put(self, reply: Delta | Answer | Failure | EngineDead) -> None:
        """Hands over one reply."""
        self._replies.put_nowait(reply)

    async def next(self) -> Delta | Answer:
        """The next reply. Raises the error the engine answered with, or EngineDead."""
        reply = await self._replies.get()
        if isinstance(reply, EngineDead):
            raise reply
        if isinstance(reply, Failure):
            raise error_from_wire(reply.kind, reply.message, reply.param, reply.code)
        return reply


class Connection:
    """A DEALER socket to the door of one engine. Make it inside a running loop; close it there."""

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
        self._heard = asyncio.get_running_loop().time()
        self._epoch: int | None = None
        self._dead: EngineDead | None = None  # until something is heard again
        self._over: EngineDead | None = None  # for good
        self._tasks = [asyncio.ensure_future(self._work(task)) for task in (self._receive(), self._ping())]

    def new_id(self) -> int:
        """A number no call of this connection has had."""
        return next(self._ids)

    @contextlib.asynccontextmanager
    async def call(self, message: Submit | Command) -> AsyncIterator[Call]:
        """Sends a call and yields what answers it; leaving with an exception, or early, cancels it.

        Raises InvalidRequest for what no frame can hold, EngineDead.
        """
        if (gone := self._over or self._dead) is not None:
            raise gone
        frame = self._encode(message)
        call = self._calls[message.id] = Call(message.id)
        try:
            await self._socket.send(frame)  # no high-water mark: the future is done at once
            yield call
        finally:
            del self._calls[message.id]
            if isinstance(message, Submit) and self._over is None:
                self._socket.send(self._encode(Cancel(message.id)))  # of a finished call: ignored there

    async def close(self) -> None:
        """Ends the connection, and its open calls with EngineDead. The engine aborts them when it misses the pings."""
        self._over = EngineDead("the engine was closed")
        self._tell(self._over)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._context.destroy(linger=500)

    def _encode(self, message: Submit | Cancel | Command | Ping) -> bytes:
        """The frame; the engine drops the connection of who sends a larger one than it takes."""
        try:
            frame = self._encoder.encode(message)
        except (OverflowError, UnicodeEncodeError, TypeError, msgspec.MsgspecError) as error:
            raise InvalidRequest(f"this cannot be sent: {error}") from error
        if len(frame) > MAX_FRAME_BYTES:
            raise InvalidRequest(f"a call of {len(frame)} bytes is above the bound of {MAX_FRAME_BYTES}")
        return frame

    async def _work(self, task: Coroutine[Any, Any, NoReturn]) -> None:
        """Runs one of the connection's endless tasks. An exception in it ends all open calls."""
        try:
            await task
        except Exception as error:
            log.exception("the connection to the engine at %s broke", self._address)
            self._over = EngineDead(f"the connection to the engine broke: {type(error).__name__}: {error}")
            self._tell(self._over)

    def _tell(self, loss: EngineDead) -> None:
        """Ends all open calls."""
        for call in self._calls.values():
            call.put(loss)

    async def _receive(self) -> NoReturn:
        while True:
            message = self._read(await self._socket.recv())
            self._heard = asyncio.get_running_loop().time()
            self._dead = None
            if message is None:
                continue
            if isinstance(message, Ping):
                self._meet(message.epoch)
            elif message.id in self._calls:  # else: a call that was left
                self._calls[message.id].put(message)

    def _read(self, frame: bytes) -> ToClient | None:
        """The message of a frame; of an answer that cannot be read, its call's failure."""
        try:
            return self._decoder.decode(frame)
        except DECODE_ERRORS as error:
            log.warning("the connection refused a frame of %d bytes: %s", len(frame), error)
            id = _answered(frame)
            return None if id is None else Failure(id, InternalError.kind, f"an answer cannot be read: {error}")

    def _meet(self, epoch: int) -> None:
        """Who answers now. Another one than before does not know the calls that are open."""
        if self._epoch is not None and epoch != self._epoch:
            lost = EngineDead("the engine's front end was restarted and this call was lost: send it again")
            self._tell(lost)
        self._epoch = epoch

    async def _ping(self) -> NoReturn:
        while True:
            silent = asyncio.get_running_loop().time() - self._heard
            if silent > SILENT_SECONDS and self._dead is None:
                self._dead = EngineDead(f"no engine answers at {self._address}")
                self._tell(self._dead)
            await self._socket.send(self._encode(Ping()))
            await asyncio.sleep(PING_SECONDS)


def _answered(frame: bytes) -> int | None:
    """The id of the call that a frame would answer, if that can be read of it."""
    with contextlib.suppress(*DECODE_ERRORS):
        match msgspec.msgpack.decode(frame):
            case ["Delta" | "Answer" | "Failure", int(id), *_] if not isinstance(id, bool):
                return id
    return None
