"""The ZeroMQ door: embedding hosts over a ROUTER socket, the same streams as over HTTP.

    host --Submit--> a task that reads the stream --Delta ... Delta | Failure--> host
    host --Cancel--> its stream is cancelled        host --Ping each second--> Ping in return

A host that is silent for five seconds is taken for gone: its requests are aborted, and fail, should it be listening
again later (it may only have been stopped for a while). What cannot be decoded is refused with a log
line, and with a Failure where its id can still be read. Knows nothing of text or adapters.
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
from engine.ipc import MAX_FRAME_BYTES, UNREADABLE
from engine.messages import Answer, Cancel, Command, Delta, Failure, Ping, Submit, ToDoor
from tokenizer_proc.adapters.lifecycle import LoadRequest
from tokenizer_proc.frontend import Frontend, Stream
from tokenizer_proc.telemetry.error_log import error_fields

log = logging.getLogger(__name__)

SILENT_SECONDS = 5.0
CHECK_SECONDS = 1.0


class _Client:
    """One embedding host: when it was last heard, and what runs for it by its own ids."""

    def __init__(self) -> None:
        self.heard = time.monotonic()
        self.streams: dict[int, Stream] = {}
        self.tasks: set[asyncio.Task[None]] = set()

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        """Runs `work` until it ends or the host is gone."""
        task = asyncio.ensure_future(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)


class ZmqServer:
    """Serves `address` until `close`. Make and run it inside a running loop."""

    def __init__(
        self, context: zmq.asyncio.Context, address: str, frontend: Frontend, max_frame: int = MAX_FRAME_BYTES
    ) -> None:
        self._frontend = frontend
        self._max_frame = max_frame
        self._hosts: dict[bytes, _Client] = {}
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[ToDoor] = msgspec.msgpack.Decoder(ToDoor)
        self._socket: zmq.asyncio.Socket = context.socket(zmq.ROUTER)
        for option in (zmq.SNDHWM, zmq.RCVHWM, zmq.LINGER):
            self._socket.setsockopt(option, 0)
        self._socket.setsockopt(zmq.MAXMSGSIZE, max_frame)
        self._socket.bind(address)

    async def serve(self) -> None:
        """Takes messages in until cancelled, or until what it reads or watches with breaks."""
        tasks = [asyncio.ensure_future(self._read()), asyncio.ensure_future(self._watch())]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()

    def close(self) -> None:
        """Aborts what is open and drops the socket."""
        for identity in list(self._hosts):
            self._forget(identity)
        self._socket.close()

    @property
    def open(self) -> int:
        """How many calls run."""
        return sum(len(host.tasks) for host in self._hosts.values())

    async def _read(self) -> NoReturn:
        while True:
            frames = await self._socket.recv_multipart()
            if len(frames) == 2:
                self._take(*frames)
            else:
                log.warning("the door refused a message of %d frames", len(frames))

    def _take(self, identity: bytes, frame: bytes) -> None:
        host = self._hosts.setdefault(identity, _Client())
        host.heard = time.monotonic()
        try:
            message = self._decoder.decode(frame)
        except UNREADABLE as error:
            log.warning("the door refused a frame of %d bytes: %s", len(frame), error)
            self._refuse(identity, frame, str(error))
            return
        match message:
            case Ping():
                self._send(identity, Ping(self._frontend.epoch))
            case Submit():
                self._submit(identity, host, message)
            case Cancel():
                if message.id in host.streams:
                    host.streams[message.id].cancel()
            case Command():
                host.start(self._answer(identity, message))

    def _submit(self, identity: bytes, host: _Client, submit: Submit) -> None:
        if submit.id in host.streams:
            error = InvalidRequest(f"request id {submit.id} is open already: use a new number", param="id")
            log.info("submit %s", logs.pairs(id=submit.id, **error_fields(error)))
            self._send(identity, _failure(submit.id, error))
            return
        stream = host.streams[submit.id] = self._frontend.open(submit)
        host.start(self._run(identity, host, submit.id, stream))

    async def _run(self, identity: bytes, host: _Client, id: int, stream: Stream) -> None:
        """Reads one stream to its end, for a host, and says in one line of the log how it ended."""
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
            del host.streams[id]

    async def _answer(self, identity: bytes, command: Command) -> None:
        """Answers a command; adapters may take their time."""
        try:
            answer: Answer | Failure = await self._command(command)
        except EngineError as error:
            log.info("command %s", logs.pairs(id=command.id, call=command.call, **error_fields(error)))
            answer = _failure(command.id, error)
        except Exception as error:
            log.exception("command %s", logs.pairs(id=command.id, call=command.call, kind=InternalError.kind))
            answer = _failure(command.id, InternalError(f"{type(error).__name__}: {error}"))
        self._send(identity, answer)

    async def _command(self, command: Command) -> Answer:
        adapters, lifecycle = self._frontend.adapters, self._frontend.lifecycle
        match command.call:
            case "list":
                card = adapters.card(command.lora_name) if command.lora_name else None
                return Answer(id=command.id, adapters=[card] if card else [] if command.lora_name else adapters.cards())
            case "info":
                info = self._frontend.info()
                return Answer(
                    id=command.id, info={name: msgspec.Raw(msgspec.msgpack.encode(info[name])) for name in info}
                )
            case "load":
                ask = LoadRequest(
                    name=command.lora_name,
                    path=command.lora_path,
                    pinned=command.pinned,
                    preload=command.preload,
                    load_inplace=command.load_inplace,
                )
                entry = await lifecycle.load(ask)
            case "unload":
                entry = await lifecycle.unload(command.lora_name)
                await lifecycle.freed(entry)
            case "pin" | "unpin":
                entry = await lifecycle.pin(command.lora_name, command.call == "pin")
        return Answer(id=command.id, adapters=[entry.card(adapters.base_names[0])])

    def _refuse(self, identity: bytes, frame: bytes, reason: str) -> None:
        """Answers a frame that is no message, if it is one with an id: [tag, id, ...]."""
        try:
            match msgspec.msgpack.decode(frame):
                case [str(), int(id), *_] if not isinstance(id, bool):
                    self._send(identity, _failure(id, InvalidRequest(f"the message cannot be read: {reason}")))
        except UNREADABLE:
            return

    def _send(self, identity: bytes, message: Delta | Answer | Failure | Ping) -> None:
        frame = self._encoder.encode(message)
        if len(frame) > self._max_frame and not isinstance(message, Failure | Ping):
            error = InternalError(f"an answer of {len(frame)} bytes exceeds the frame bound")
            frame = self._encoder.encode(_failure(message.id, error))
        self._socket.send_multipart([identity, frame])  # no high-water mark: done at once; a gone host is dropped

    async def _watch(self) -> NoReturn:
        while True:
            await asyncio.sleep(CHECK_SECONDS)
            now = time.monotonic()
            for identity, host in list(self._hosts.items()):
                if now - host.heard > SILENT_SECONDS:
                    self._give_up(identity, host)

    def _give_up(self, identity: bytes, host: _Client) -> None:
        if host.streams:
            log.info("an embedding host is silent; %d of its calls are aborted", len(host.streams))
        for id in host.streams:
            self._send(identity, _failure(id, EngineDead("this host was silent for so long that its call was aborted")))
        self._forget(identity)

    def _forget(self, identity: bytes) -> None:
        for task in list(self._hosts.pop(identity).tasks):
            task.cancel()


def _failure(id: int, error: EngineError) -> Failure:
    return Failure(id, error.kind, error.message, error.param, error.code)
