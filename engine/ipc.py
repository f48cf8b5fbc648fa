"""Typed inboxes over ZeroMQ: each process incarnation binds a PULL socket; the others connect PUSH sockets to it.

An inbox decodes one union of messages; any other frame is refused and logged. Sockets have no high-water mark (bounded
queues in both directions can deadlock; the HTTP and ZeroMQ servers bound the requests instead). Frames have a size
limit that is checked before sending, because libzmq drops oversized frames silently.

If the path of a socket is deleted, its connections go on, but no other process could connect. So each inbox binds its
path again when it finds it deleted, within KEEP_SECONDS; the launcher makes the directory again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import stat
import time
from collections.abc import Iterator
from typing import Any, Generic, NoReturn, TypeVar

import msgspec
import zmq
import zmq.asyncio

from engine.errors import InternalError

T = TypeVar("T")
log = logging.getLogger(__name__)

MAX_FRAME_BYTES = 64 << 20
KEEP_SECONDS = 1.0

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


def is_private(directory: str) -> bool:
    """Returns whether this is a directory that only this user can enter."""
    try:
        found = os.lstat(directory)
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o077


class BoundAddress:
    """The address that `socket` is bound to. `keep`, called regularly, binds it again if its path was deleted."""

    def __init__(self, socket: zmq.Socket[Any], address: str) -> None:
        socket.bind(address)
        self._socket, self._address = socket, address
        self._path = address.removeprefix("ipc://")
        self._is_private = is_private(os.path.dirname(self._path))
        self._due = time.monotonic() + KEEP_SECONDS

    def keep(self) -> None:
        """Binds the address again if its path is gone, at most once in KEEP_SECONDS.

        A path in a directory that was private, as those of a launch are, is bound only where the directory is private.
        """
        if time.monotonic() < self._due:
            return
        self._due = time.monotonic() + KEEP_SECONDS
        if os.path.lexists(self._path) or (self._is_private and not is_private(os.path.dirname(self._path))):
            return
        with contextlib.suppress(zmq.ZMQError):  # tried again; libzmq keeps the former listener and its connections
            self._socket.bind(self._address)
            log.warning("%s was deleted and is bound again", self._path)


def _bound(socket: zmq.Socket[Any], address: str, max_frame: int) -> BoundAddress:
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.MAXMSGSIZE, max_frame)
    return BoundAddress(socket, address)


class Inbox(Generic[T]):
    """A bound PULL socket for blocking loops. `union` is the type of the messages it accepts."""

    def __init__(self, context: zmq.Context[Any], address: str, union: Any, max_frame: int = MAX_FRAME_BYTES) -> None:
        self._decode: _FrameDecoder[T] = _FrameDecoder(union, address)
        self._socket: zmq.Socket[bytes] = context.socket(zmq.PULL)
        self._address = _bound(self._socket, address, max_frame)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)

    def watch(self, descriptor: int) -> None:
        """Makes `receive` also return, without a message, when this file descriptor is readable."""
        self._poller.register(descriptor, zmq.POLLIN)

    def receive(self, timeout: float | None) -> Iterator[T]:
        """Yields all messages that have arrived; waits up to `timeout` seconds (None: for ever) for the first."""
        if not self._poll(float("inf") if timeout is None else timeout):
            return
        while True:
            try:
                message = self._decode(self._socket.recv(zmq.NOBLOCK))
            except zmq.Again:
                return
            if message is not None:
                yield message

    def _poll(self, timeout: float) -> bool:
        """Waits for up to `timeout` seconds until the socket or a watched descriptor is readable. Returns whether."""
        until = time.monotonic() + timeout
        while True:
            self._address.keep()
            left = max(0.0, until - time.monotonic())
            if self._poller.poll(int(1000 * min(left, KEEP_SECONDS))):
                return True
            if left <= KEEP_SECONDS:
                return False

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
        self._address = _bound(self._socket, address, max_frame)
        self._keeping: asyncio.Task[NoReturn] | None = None

    def __aiter__(self) -> AsyncInbox[T]:
        return self

    async def __anext__(self) -> T:
        if self._keeping is None:
            self._keeping = asyncio.ensure_future(self._keep())
        while True:
            message = self._decode(await self._socket.recv())
            if message is not None:
                return message

    def close(self) -> None:
        """Closes the socket and drops queued messages."""
        if self._keeping is not None:
            self._keeping.cancel()
        self._socket.close()

    async def _keep(self) -> NoReturn:
        while True:
            await asyncio.sleep(KEEP_SECONDS)
            self._address.keep()
