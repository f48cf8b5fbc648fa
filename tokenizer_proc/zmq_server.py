"""The ZeroMQ server for embedding hosts, which are its clients: a ROUTER socket with the same streams as over HTTP.

    client --Submit--> a task that reads the stream --Delta ... Delta | Failure--> client
    client --Cancel--> its stream is cancelled        client --Ping each second--> Ping in return

A client that is silent for five seconds counts as gone: its requests are aborted, and a Failure is sent for each, in
case the client was only stopped for a while. A frame that cannot be decoded is logged and dropped; if its id can be
read, a Failure is sent too.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine
from typing import Any, NoReturn

import msgspec
import zmq
import zmq.asyncio

from engine import logs
from engine.errors import EngineDead, EngineError, InternalError, InvalidRequest
from engine.ipc import DECODE_ERRORS, MAX_FRAME_BYTES, BoundAddress
from engine.messages import Answer, Cancel, Command, Delta, Failure, Ping, Submit, ToZmqServer
from tokenizer_proc.commands import run_command
from tokenizer_proc.frontend import Frontend, Stream
from tokenizer_proc.telemetry.error_log import error_fields

log = logging.getLogger(__name__)

SILENT_SECONDS = 5.0
CHECK_SECONDS = 1.0


class _Head(msgspec.Struct, array_like=True, frozen=True):
    """The beginning of a message that has an id. Nothing is made of the rest, which may be large."""

    tag: str
    id: int


class _Client:
    """One embedding host: the time of its last frame, its streams by the host's own ids, and its tasks."""

    def __init__(self) -> None:
        self.heard = time.monotonic()
        self.streams: dict[int, Stream] = {}
        self.tasks: set[asyncio.Task[None]] = set()

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        """Runs `work` in a task, which is cancelled if the client is gone."""
        task = asyncio.ensure_future(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)


class ZmqServer:
    """Serves embedding hosts at `address` until `close`. Must be created inside a running event loop."""

    def __init__(
        self, context: zmq.asyncio.Context, address: str, frontend: Frontend, max_frame: int = MAX_FRAME_BYTES
    ) -> None:
        self._frontend = frontend
        self._max_frame = max_frame
        self._clients: dict[bytes, _Client] = {}
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[ToZmqServer] = msgspec.msgpack.Decoder(ToZmqServer)
        self._socket: zmq.asyncio.Socket = context.socket(zmq.ROUTER)
        for option in (zmq.SNDHWM, zmq.RCVHWM, zmq.LINGER):
            self._socket.setsockopt(option, 0)
        self._socket.setsockopt(zmq.MAXMSGSIZE, max_frame)
        self._address = BoundAddress(self._socket, address)

    async def serve(self) -> None:
        """Serves until cancelled. Raises the error of reading the socket or of watching for silent clients."""
        tasks = [asyncio.ensure_future(self._read()), asyncio.ensure_future(self._watch())]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()

    def close(self) -> None:
        """Aborts the open calls and closes the socket."""
        for identity in list(self._clients):
            self._forget(identity)
        self._socket.close()

    @property
    def open_calls(self) -> int:
        """The number of open calls."""
        return sum(len(client.tasks) for client in self._clients.values())

    async def _read(self) -> NoReturn:
        while True:
            frames = await self._socket.recv_multipart()
            if len(frames) == 2:
                self._handle(*frames)
            else:
                log.warning("the ZeroMQ server refused a message of %d frames", len(frames))

    def _handle(self, identity: bytes, frame: bytes) -> None:
        client = self._clients.setdefault(identity, _Client())
        client.heard = time.monotonic()
        try:
            message = self._decoder.decode(frame)
        except DECODE_ERRORS as error:
            log.warning("the ZeroMQ server refused a frame of %d bytes: %s", len(frame), error)
            self._refuse(identity, frame, str(error))
            return
        match message:
            case Ping():
                self._send(identity, Ping(self._frontend.epoch))
            case Submit():
                self._submit(identity, client, message)
            case Cancel():
                if message.id in client.streams:
                    client.streams[message.id].cancel()
            case Command():
                client.start(self._answer(identity, message))

    def _submit(self, identity: bytes, client: _Client, submit: Submit) -> None:
        if submit.id in client.streams:
            error = InvalidRequest(f"request id {submit.id} is open already: use a new number", param="id")
            log.info("submit %s", logs.pairs(id=submit.id, **error_fields(error)))
            self._send(identity, _failure(submit.id, error))
            return
        stream = client.streams[submit.id] = self._frontend.open(submit)
        client.start(self._run(identity, client, submit.id, stream))

    async def _run(self, identity: bytes, client: _Client, id: int, stream: Stream) -> None:
        """Sends one stream's deltas to a client, and writes one log line on how the stream ended."""
        tokens, finish = 0, set[str]()
        try:
            async with stream:
                async for delta in stream:
                    self._send(identity, delta)
                    tokens += len(delta.token_ids)
                    finish |= {delta.finish_reason} if delta.finish_reason else set()
            ends = ",".join(sorted(finish))
            log.info("submit %s", logs.pairs(id=id, prompt=len(stream.prompt_ids), tokens=tokens, finish=ends))
        except EngineError as error:
            level = logging.ERROR if isinstance(error, InternalError) else logging.INFO
            log.log(level, "submit %s", logs.pairs(id=id, **error_fields(error)))
            self._send(identity, _failure(id, error))
        except Exception as error:
            log.exception("submit %s", logs.pairs(id=id, kind=InternalError.kind))
            self._send(identity, _failure(id, InternalError(f"{type(error).__name__}: {error}")))
        finally:
            del client.streams[id]

    async def _answer(self, identity: bytes, command: Command) -> None:
        """Runs a command and sends its Answer or Failure."""
        try:
            answer: Answer | Failure = await run_command(self._frontend, command)
        except EngineError as error:
            log.info("command %s", logs.pairs(id=command.id, call=command.call, **error_fields(error)))
            answer = _failure(command.id, error)
        except Exception as error:
            log.exception("command %s", logs.pairs(id=command.id, call=command.call, kind=InternalError.kind))
            answer = _failure(command.id, InternalError(f"{type(error).__name__}: {error}"))
        self._send(identity, answer)

    def _refuse(self, identity: bytes, frame: bytes, reason: str) -> None:
        """Sends a Failure for a frame that is not a message, if its id can be read: [tag, id, ...]."""
        try:
            head = msgspec.msgpack.decode(frame, type=_Head)
        except DECODE_ERRORS:
            return
        self._send(identity, _failure(head.id, InvalidRequest(f"the message cannot be read: {reason}")))

    def _send(self, identity: bytes, message: Delta | Answer | Failure | Ping) -> None:
        frame = self._encoder.encode(message)
        if len(frame) > self._max_frame and not isinstance(message, Failure | Ping):
            error = InternalError(f"an answer of {len(frame)} bytes exceeds the frame bound")
            frame = self._encoder.encode(_failure(message.id, error))
        # without a high-water mark sending does not block; frames for a client that is gone are dropped
        self._socket.send_multipart([identity, frame])

    async def _watch(self) -> NoReturn:
        while True:
            await asyncio.sleep(CHECK_SECONDS)
            self._address.keep()
            now = time.monotonic()
            for identity, client in list(self._clients.items()):
                if now - client.heard > SILENT_SECONDS:
                    self._drop_silent(identity, client)

    def _drop_silent(self, identity: bytes, client: _Client) -> None:
        if client.streams:
            log.info("an embedding host is silent; %d of its calls are aborted", len(client.streams))
        for id in client.streams:
            self._send(identity, _failure(id, EngineDead("this host was silent for so long that its call was aborted")))
        self._forget(identity)

    def _forget(self, identity: bytes) -> None:
        for task in list(self._clients.pop(identity).tasks):
            task.cancel()


def _failure(id: int, error: EngineError) -> Failure:
    return Failure(id, error.kind, error.message, error.param, error.code)
