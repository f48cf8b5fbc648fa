"""Typed inboxes over ZeroMQ: each process incarnation binds a PULL socket; the others connect PUSH sockets to it.

An inbox decodes one union of messages; any other frame is refused and logged. Sockets have no high-water mark (bounded
queues in both directions can deadlock; the HTTP and ZeroMQ servers bound the requests instead). Frames have a size
limit that is checked before sending, because libzmq drops oversized frames silently.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

import msgspec
import zmq
import zmq.asyncio

from engine.errors import InternalError

T = TypeVar("T")
log = logging.getLogger(__name__)

MAX_FRAME_BYTES = 64 << 20

DECODE_ERRORS = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, MemoryError)
"""The errors that decoding a frame or a file may raise: wrong structure, not UTF-8, nested too deeply, too large."""


class Outbox:
    """A PUSH socket to one inbox. Sending never blocks, even if the inbox is not bound yet."""

    def __init__(self, context: zmq.Context[Any], address: str, max_frame: int = MAX_FRAME_BYTES) -> None:
        self._context = context
        self._max_frame = max_frame
        self._encoder = msgspec.msgpack.Encoder()
        self._connect(address)

    def send(self, message: msgspec.Struct) -> None:
        """Queues one message. Raises InternalError if it exceeds the frame limit."""
        frame = self._encoder.encode(message)
        if len(frame) > self._max_frame:
            raise InternalError(f"a {type(message).__name__} of {len(frame)} bytes exceeds the frame bound")
        self._socket.send(frame, copy=False)

    def reconnect(self, address: str) -> None:
        """Sends to another inbox from now on. Queued messages still go to the former one for up to a second."""
        self.close()
        self._connect(address)

    def close(self) -> None:
        """Closes the socket; queued messages are still delivered for up to a second."""
        self._socket.close()

    def _connect(self, address: str) -> None:
        self.address = address
        self._socket: zmq.Socket[bytes] = zmq.Context(self._context).socket(zmq.PUSH)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.LINGER, 1000)
        self._socket.connect(address)


class _FrameDecoder(Generic[T]):
    """Decodes a frame into a message of the union. If that fails, logs which field is wrong and returns None."""

    def __init__(self, union: Any, name: str) -> None:
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(union)
        self._name = name

    def __call__(self, frame: bytes) -> T | None:
        try:
            return self._decoder.decode(frame)
        except DECODE_ERRORS as error:  # a ValidationError contains the path of the invalid field
            log.warning("%s refused a frame of %d bytes: %s", self._name, len(frame), error)
            return None


def _bind(socket: zmq.Socket[Any], address: str, max_frame: int) -> None:
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.MAXMSGSIZE, max_frame)
    socket.bind(address)


class Inbox(Generic[T]):
    """A bound PULL socket for blocking loops. `union` is the type of the messages it accepts."""

    def __init__(self, context: zmq.Context[Any], address: str, union: Any, max_frame: int = MAX_FRAME_BYTES) -> None:
        self._decode: _FrameDecoder[T] = _FrameDecoder(union, address)
        self._socket: zmq.Socket[bytes] = context.socket(zmq.PULL)
        _bind(self._socket, address, max_frame)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)

    def watch(self, descriptor: int) -> None:
        """Makes `receive` also return, without a message, when this file descriptor is readable."""
        self._poller.register(descriptor, zmq.POLLIN)

    def receive(self, timeout: float | None) -> Iterator[T]:
        """Yields all messages that have arrived; waits up to `timeout` seconds (None: for ever) for the first."""
        if not self._poller.poll(None if timeout is None else max(0, int(timeout * 1000))):
            return
        while True:
            try:
                message = self._decode(self._socket.recv(zmq.NOBLOCK))
            except zmq.Again:
                return
            if message is not None:
                yield message

    def close(self) -> None:
        """Closes the socket and drops queued messages."""
        self._socket.close()


class AsyncInbox(Generic[T]):
    """A bound PULL socket for asyncio: `async for message in inbox`."""

    def __init__(
        self, context: zmq.asyncio.Context, address: str, union: Any, max_frame: int = MAX_FRAME_BYTES
    ) -> None:
        self._decode: _FrameDecoder[T] = _FrameDecoder(union, address)
        self._socket: zmq.asyncio.Socket = context.socket(zmq.PULL)
        _bind(self._socket, address, max_frame)

    def __aiter__(self) -> AsyncInbox[T]:
        return self

    async def __anext__(self) -> T:
        while True:
            message = self._decode(await self._socket.recv())
            if message is not None:
                return message

    def close(self) -> None:
        """Closes the socket and drops queued messages."""
        self._socket.close()
