"""Typed inboxes over ZeroMQ: one PULL socket a process incarnation, bound; everyone else connects a PUSH.

An inbox is typed by its union: anything else is refused and logged, never executed. There is no high-water mark
inside (bounded queues both ways deadlock; bounds stand at the door); frames are bounded and checked before sending,
because libzmq drops oversized ones silently. Knows nothing of what the messages mean.
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
"""What decoding a frame or a file may raise: it is no such message, no UTF-8, nested too deeply, too large."""


class Outbox:
    """A PUSH socket to one inbox. Sending never blocks; the peer may not be bound yet."""

    def __init__(self, context: zmq.Context[Any], address: str, max_frame: int = MAX_FRAME_BYTES) -> None:
        self._context = context
        self._max_frame = max_frame
        self._encoder = msgspec.msgpack.Encoder()
        self._connect(address)

    def send(self, message: msgspec.Struct) -> None:
        """Queues one message. Raises InternalError when it is larger than a frame may be."""
        frame = self._encoder.encode(message)
        if len(frame) > self._max_frame:
            raise InternalError(f"a {type(message).__name__} of {len(frame)} bytes exceeds the frame bound")
        self._socket.send(frame, copy=False)

    def reconnect(self, address: str) -> None:
        """Sends to another inbox from now on; what was queued is still delivered to the former one, as by `close`."""
        self.close()
        self._connect(address)

    def close(self) -> None:
        """Drops the socket; what was queued is still delivered for up to a second."""
        self._socket.close()

    def _connect(self, address: str) -> None:
        self.address = address
        self._socket: zmq.Socket[bytes] = zmq.Context(self._context).socket(zmq.PUSH)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.LINGER, 1000)
        self._socket.connect(address)


class _Decoding(Generic[T]):
    """Frame -> message of the union, or None with a log line that names the bad field."""

    def __init__(self, union: Any, name: str) -> None:
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(union)
        self._name = name

    def __call__(self, frame: bytes) -> T | None:
        try:
            return self._decoder.decode(frame)
        except DECODE_ERRORS as error:  # ValidationError carries the path of the bad field
            log.warning("%s refused a frame of %d bytes: %s", self._name, len(frame), error)
            return None


def _bind(socket: zmq.Socket[Any], address: str, max_frame: int) -> None:
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.MAXMSGSIZE, max_frame)
    socket.bind(address)


class Inbox(Generic[T]):
    """A bound PULL socket for plain loops. `union` is the type of what may arrive."""

    def __init__(self, context: zmq.Context[Any], address: str, union: Any, max_frame: int = MAX_FRAME_BYTES) -> None:
        self._decode: _Decoding[T] = _Decoding(union, address)
        self._socket: zmq.Socket[bytes] = context.socket(zmq.PULL)
        _bind(self._socket, address, max_frame)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)

    def watch(self, descriptor: int) -> None:
        """From now on `receive` also returns, with no message, when this file descriptor is readable."""
        self._poller.register(descriptor, zmq.POLLIN)

    def receive(self, timeout: float | None) -> Iterator[T]:
        """Everything that has arrived; waits up to `timeout` seconds (None: for ever) for the first message."""
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
        """Drops the socket and what is queued in it."""
        self._socket.close()


class AsyncInbox(Generic[T]):
    """The same for an asyncio loop: `async for message in inbox`."""

    def __init__(
        self, context: zmq.asyncio.Context, address: str, union: Any, max_frame: int = MAX_FRAME_BYTES
    ) -> None:
        self._decode: _Decoding[T] = _Decoding(union, address)
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
        """Drops the socket and what is queued in it."""
        self._socket.close()
