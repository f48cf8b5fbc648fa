"""The embedded client against a scripted server: routing, errors, cancels, and a silent server."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
import zmq.asyncio

from engine import Engine, EngineDead, InternalError, InvalidRequest, LoRARequest, NotFound, Overloaded, SamplingParams
from engine.client import connection
from engine.messages import AdapterCard, Answer, Cancel, Command, Delta, Failure, Ping, Submit, ToZmqServer, Usage


class ScriptedServer:
    """A ROUTER socket that sends the `replies` to each message and records the messages."""

    def __init__(self, address: str, replies: Callable[[Any], list[Any]]) -> None:
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.bind(address)
        self._make_replies = replies
        self.received: list[Any] = []
        self._task = asyncio.ensure_future(self._serve())

    async def _serve(self) -> None:
        decoder = msgspec.msgpack.Decoder(ToZmqServer)
        while True:
            identity, frame = await self._socket.recv_multipart()
            message = decoder.decode(frame)
            self.received.append(message)
            for reply in self._make_replies(message):
                frame = reply if isinstance(reply, bytes) else msgspec.msgpack.encode(reply)
                await self._socket.send_multipart([identity, frame])

    async def wait_for(self, type_: type) -> Any:
        async with asyncio.timeout(20):
            while not (found := [message for message in self.received if isinstance(message, type_)]):
                await asyncio.sleep(0.005)
        return found[0]

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._context.destroy(linger=0)


def _replies(message: Any) -> list[Any]:
    """Returns two deltas for each choice, a list of adapters that may be changed, and failures for certain prompts."""
    if isinstance(message, Command) and message.call != "list":
        if message.lora_path == "nowhere":
            return [Failure(message.id, "not_found_error", "No adapter found for nowhere", "lora_path")]
        name, path = message.lora_name, message.lora_path
        card = AdapterCard(name=name, adapter_id=2, path=path, root=path, parent="base", pinned=message.pinned)
        return [Answer(id=message.id, adapters=[card])]
    if isinstance(message, Command):
        card = AdapterCard(name="pirate", adapter_id=1, path="given", root="/resolved", parent="base")
        return [Answer(id=message.id, adapters=[card])]
    if not isinstance(message, Submit):
        return [message] if isinstance(message, Ping) else []
    if message.params.n < 1:
        return [Failure(message.id, "invalid_request_error", "no choice", "n")]
    match message.prompt:
        case "too much":
            return [Failure(message.id, "overloaded_error", "full")]
        case "bad":
            return [Failure(message.id, "invalid_request_error", "bad prompt", "prompt", "why")]
        case "silence":
            return []
    out: list[Any] = [Delta(id=message.id + 1000, text="of another call")]
    for index in range(message.params.n):
        out.append(Delta(id=message.id, index=index, text=f"{message.lora} ", token_ids=[1]))
        out.append(Delta(id=message.id, index=index, text="ok", token_ids=[2], finish_reason="stop", usage=Usage(1, 2)))
    return out


def _run(
    tmp_path: Path,
    work: Callable[[Engine, ScriptedServer], Awaitable[None]],
    replies: Callable[[Any], list[Any]] = _replies,
) -> None:
    async def main() -> None:
        async with asyncio.timeout(20):
            await served()

    async def served() -> None:
        address = f"ipc://{tmp_path}/server"
        server = ScriptedServer(address, replies)
        try:
            async with Engine.connect(address) as engine:
                await work(engine, server)
        finally:
            await server.close()

    asyncio.run(main())


def test_deltas_are_routed_to_their_call(tmp_path: Path) -> None:
    async def work(engine: Engine, server: ScriptedServer) -> None:
        answers = await engine.generate_all(["a", [1, 2], [{"role": "user", "content": "c"}]], lora=["x", None, "z"])
        assert [answer.text for answer in answers] == ["x ok", "None ok", "z ok"]
        assert answers[0].token_ids == [1, 2]
        choices = [delta.index async for delta in engine.generate("a", SamplingParams(n=2))]
        assert choices == [0, 0, 1, 1]

    _run(tmp_path, work)


def test_failures_are_raised_as_their_own_class(tmp_path: Path) -> None:
    async def work(engine: Engine, server: ScriptedServer) -> None:
        with pytest.raises(Overloaded):
            await engine.generate_all(["a", "too much"])
        with pytest.raises(InvalidRequest) as caught:
            await anext(engine.generate("bad"))
        assert (caught.value.param, caught.value.code) == ("prompt", "why")
        with pytest.raises(InvalidRequest, match="prompt"):
            await anext(engine.generate([{"role": "user"}]))
        with pytest.raises(InvalidRequest, match="bytes"):
            await anext(engine.generate(b"text"))
        with pytest.raises(InvalidRequest, match="cannot be sent"):
            await anext(engine.generate("a", priority=1 << 70))
        with pytest.raises(InvalidRequest, match="cannot be sent"):
            await anext(engine.generate("\ud800"))
        with pytest.raises(InvalidRequest, match="above the bound"):
            await anext(engine.generate("x" * (65 << 20)))
        with pytest.raises(InvalidRequest, match="no choice"):
            await anext(engine.generate("a", SamplingParams(n=0)))
        with pytest.raises(InvalidRequest, match="2 for 1 prompts"):
            await engine.generate_all(["a"], lora=["x", "y"])

    _run(tmp_path, work)


def test_leaving_generate_early_cancels_the_request(tmp_path: Path) -> None:
    async def work(engine: Engine, server: ScriptedServer) -> None:
        stream = engine.generate("a")
        await anext(stream)
        await stream.aclose()
        submitted = await server.wait_for(Submit)
        assert (await server.wait_for(Cancel)).id == submitted.id

    _run(tmp_path, work)


def test_lora_request_is_checked_against_loaded_adapters(tmp_path: Path) -> None:
    async def work(engine: Engine, server: ScriptedServer) -> None:
        for path in ("given", "/resolved"):
            (answer,) = await engine.generate_all(["a"], lora=LoRARequest("pirate", 1, path))
            assert answer.text == "pirate ok"
        with pytest.raises(InvalidRequest, match="loaded from given, not from other"):
            await engine.generate_all(["a"], lora=LoRARequest("pirate", 1, "other"))

    _run(tmp_path, work)


def test_lora_request_loads_its_adapter_once(tmp_path: Path) -> None:
    loaded: dict[str, AdapterCard] = {}

    def replies(message: Any) -> list[Any]:
        if isinstance(message, Command) and message.call == "list":
            return [Answer(id=message.id, adapters=[*loaded.values()])]
        answers = _replies(message)
        if isinstance(message, Command) and isinstance(answers[0], Answer):
            loaded[message.lora_name] = answers[0].adapters[0]
        return answers

    async def work(engine: Engine, server: ScriptedServer) -> None:
        sailor = LoRARequest("sailor", 1, "given")
        answers = await engine.generate_all(["a"] * 5, lora=sailor)
        assert {answer.text for answer in answers} == {"sailor ok"}
        await engine.generate_all(["a"], lora=sailor)
        loads = [message for message in server.received if isinstance(message, Command) and message.call == "load"]
        assert [(load.lora_name, load.lora_path, load.load_inplace) for load in loads] == [("sailor", "given", False)]
        loaded.clear()  # another client unloads it
        await engine.generate_all(["a"], lora=sailor)
        assert sum(isinstance(message, Command) and message.call == "load" for message in server.received) == 2
        for _ in range(2):  # a failed load is tried again
            with pytest.raises(NotFound, match="No adapter found"):
                await engine.generate_all(["a"], lora=LoRARequest("ghost", 1, "nowhere"))
        ghosts = [
            message for message in server.received if isinstance(message, Command) and message.lora_name == "ghost"
        ]
        assert [message.call for message in ghosts] == ["list", "load"] * 2

    _run(tmp_path, work, replies)


def test_adapter_calls_are_commands(tmp_path: Path) -> None:
    async def work(engine: Engine, server: ScriptedServer) -> None:
        card = await engine.load_lora_adapter("x", "p", pinned=True, preload=True, load_inplace=True)
        assert (card.name, card.path, card.pinned) == ("x", "p", True)
        await engine.pin_lora_adapter("x")
        await engine.unpin_lora_adapter("x")
        await engine.unload_lora_adapter("x")
        told = [message for message in server.received if isinstance(message, Command)]
        assert [message.call for message in told] == ["load", "pin", "unpin", "unload"]
        assert (told[0].pinned, told[0].preload, told[0].load_inplace) == (True, True, True)

    _run(tmp_path, work)


UNREADABLE_FRAMES = [
    b"",
    b"\xc1 garbage",
    b"\x91" * 5000,
    msgspec.msgpack.encode(["Exec", "rm"]),
    msgspec.msgpack.encode(["Ping", "x"]),
    b"\x93\xa5Delta\x05\xa1\xff",
]


def test_frame_that_is_no_message_is_ignored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def replies(message: Any) -> list[Any]:
        return [*UNREADABLE_FRAMES, *_replies(message)] if isinstance(message, Submit) else _replies(message)

    async def work(engine: Engine, server: ScriptedServer) -> None:
        for _ in range(2):
            (answer,) = await engine.generate_all(["a"])
            assert answer.text == "None ok"

    _run(tmp_path, work, replies)
    assert caplog.text.count("refused a frame") == 2 * len(UNREADABLE_FRAMES)


def test_bad_frame_with_an_id_ends_only_its_call(tmp_path: Path) -> None:
    def replies(message: Any) -> list[Any]:
        if isinstance(message, Submit) and message.prompt == "bad":
            return [msgspec.msgpack.encode(["Delta", message.id, "index"])]
        return _replies(message)

    async def work(engine: Engine, server: ScriptedServer) -> None:
        waiting = asyncio.ensure_future(engine.generate_all(["silence"]))
        await server.wait_for(Submit)
        with pytest.raises(InternalError, match="cannot be read"):
            await engine.generate_all(["bad"])
        assert not waiting.done()
        (answer,) = await engine.generate_all(["a"])
        assert answer.text == "None ok"
        waiting.cancel()

    _run(tmp_path, work, replies)


@pytest.mark.parametrize("verb", ["recv", "send"])
def test_broken_connection_ends_its_calls(tmp_path: Path, verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "PING_SECONDS", 0.05)

    async def work(engine: Engine, server: ScriptedServer) -> None:
        waiting = asyncio.ensure_future(engine.generate_all(["silence"]))
        await server.wait_for(Submit)

        def broken(*_: Any) -> Any:
            raise zmq.ZMQError(zmq.ENOTSOCK)

        monkeypatch.setattr(engine._open()._socket, verb, broken)
        if verb == "recv":
            await engine._open()._socket.send(
                msgspec.msgpack.encode(Ping())
            )  # the replies to earlier messages are read first
        with pytest.raises(EngineDead, match="the connection to the engine"):
            await waiting
        with pytest.raises(EngineDead, match="the connection to the engine"):
            await engine.adapters()

    _run(tmp_path, work)


def test_closing_an_engine_ends_its_open_calls(tmp_path: Path) -> None:
    async def main() -> None:
        address = f"ipc://{tmp_path}/server"
        server = ScriptedServer(address, lambda message: [] if isinstance(message, Command) else _replies(message))
        engine = Engine.connect(address)
        async with engine:
            one = engine._open()
            waiting = [asyncio.ensure_future(call) for call in (engine.generate_all(["silence"]), engine.info())]
            stream = engine.generate("silence")
            waiting.append(asyncio.ensure_future(anext(stream)))
            await server.wait_for(Command)
            half_read = engine.generate("a")
            await anext(half_read)
            await server.wait_for(Submit)
        for call in waiting:
            with pytest.raises(EngineDead, match="closed"):
                await call
        await half_read.aclose()
        heard = len(server.received)
        with pytest.raises(EngineDead, match="not open"):
            await engine.generate_all(["a"])
        with pytest.raises(EngineDead, match="closed"):
            async with one.call(Submit(id=one.new_id(), prompt="a")):
                pass
        with pytest.raises(EngineDead, match="not open"):
            await engine.info()
        await one.close()  # closing twice has no effect
        await asyncio.sleep(0.1)
        assert len(server.received) == heard
        await server.close()

    asyncio.run(asyncio.wait_for(main(), 20))


def test_silent_or_closed_engine_raises_engine_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "SILENT_SECONDS", 0.2)
    monkeypatch.setattr(connection, "PING_SECONDS", 0.05)

    async def main() -> None:
        engine = Engine.connect(f"ipc://{tmp_path}/nobody")
        with pytest.raises(EngineDead, match="not open"):
            await engine.adapters()
        async with engine:
            with pytest.raises(EngineDead, match="no engine answers"):
                await engine.generate_all(["a"])
            with pytest.raises(EngineDead, match="no engine answers"):
                await engine.adapters()

    asyncio.run(main())
