"""The ZeroMQ server and embedding hosts over a real ROUTER socket; the test plays the scheduler."""

from __future__ import annotations

import asyncio
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
import zmq.asyncio
from fixtures.serving.tokenizer_front import Fake

from engine.messages import MAX_PROMPT, Answer, Cancel, Command, Delta, Failure, Ping, SamplingParams, Submit, ToClient
from tokenizer_proc import zmq_server
from tokenizer_proc.zmq_server import ZmqServer


class Host:
    """A DEALER socket that speaks the protocol."""

    def __init__(self, context: zmq.asyncio.Context, address: str) -> None:
        self._socket = context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.connect(address)

    async def send(self, message: Any) -> None:
        frame = message if isinstance(message, bytes) else msgspec.msgpack.encode(message)
        await self._socket.send(frame)

    async def receive(self) -> Delta | Answer | Failure | Ping:
        return msgspec.msgpack.decode(await self._socket.recv(), type=ToClient)

    def close(self) -> None:
        self._socket.close()


@asynccontextmanager
async def opened(
    fake: Fake, address: str, max_frame: int = 1 << 16
) -> AsyncIterator[tuple[ZmqServer, Callable[[], Host]]]:
    context = zmq.asyncio.Context()
    server = ZmqServer(context, address, fake.front, max_frame)
    serving = asyncio.ensure_future(server.serve())
    hosts: list[Host] = []

    def host() -> Host:
        hosts.append(Host(context, address))
        return hosts[-1]

    try:
        yield server, host
    finally:
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        for each in hosts:
            each.close()
        server.close()
        await asyncio.sleep(0)
        context.term()


@pytest.fixture
def address(tmp_path: Path) -> str:
    return f"ipc://{tmp_path}/server"


def run(work: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        await asyncio.wait_for(work(), 20)

    asyncio.run(main())


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


def test_streams_of_two_hosts_are_kept_apart(address: str) -> None:
    fake = Fake()

    async def work() -> None:
        async with opened(fake, address) as (server, host):
            one, two = host(), host()
            for each, prompt in ((one, "hello"), (two, "world")):
                await each.send(Submit(id=1, prompt=prompt))
            await until(lambda: len(fake.generates) == 2)
            for generate in fake.generates:
                text = fake.front.tokenizer.decode(generate.prompt)
                fake.say_text(generate.request_id, f"to {text}", finish="length")
            for each, text in ((one, "to hello"), (two, "to world")):
                delta = await each.receive()
                assert isinstance(delta, Delta)
                assert (delta.id, delta.text, delta.finish_reason) == (1, text, "length")
            await until(lambda: server.open_calls == 0)

    run(work)


def test_cancel_ends_a_stream_with_abort(address: str) -> None:
    fake = Fake()

    async def work() -> None:
        async with opened(fake, address) as (_, host):
            one = host()
            await one.send(Submit(id=4, prompt="hello"))
            await until(lambda: fake.generates)
            await one.send(Cancel(4))
            await one.send(Cancel(99))
            delta = await one.receive()
            assert isinstance(delta, Delta)
            assert delta.finish_reason == "abort"
            await until(lambda: fake.front.router.open == 0)
            assert fake.aborted == [fake.generates[0].request_id]

    run(work)


def test_errors_come_back_as_failures(address: str) -> None:
    fake = Fake()

    async def work() -> None:
        async with opened(fake, address) as (_, host):
            one = host()
            await one.send(Submit(id=1, prompt="hello", lora="nope"))
            failure = await one.receive()
            assert isinstance(failure, Failure)
            assert (failure.id, failure.kind, failure.param) == (1, "not_found_error", "lora_path")
            await one.send(Submit(id=2, prompt="hello", params=SamplingParams(top_p=5.0)))
            failure = await one.receive()
            assert isinstance(failure, Failure)
            assert (failure.id, failure.kind, failure.param) == (2, "invalid_request_error", "top_p")
            await one.send(Submit(id=3, prompt="hello"))
            await until(lambda: fake.generates)
            await one.send(Submit(id=3, prompt="hello"))
            failure = await one.receive()
            assert isinstance(failure, Failure)
            assert "open already" in failure.message

    run(work)


def test_bad_frames_are_refused_and_the_server_goes_on(address: str, caplog: pytest.LogCaptureFixture) -> None:
    fake = Fake()

    async def work() -> None:
        async with opened(fake, address) as (_, host):
            one = host()
            await one.send(b"\xc1 garbage")
            await one.send(msgspec.msgpack.encode(["Exec", 5, "rm"]))
            refusal = await one.receive()
            assert isinstance(refusal, Failure)
            assert refusal.id == 5
            await one.send(Ping())
            assert await one.receive() == Ping()

    run(work)
    assert caplog.text.count("the ZeroMQ server refused a frame") == 2


LISTS = [[]] * 300_000
HOSTILE: dict[str, Any] = {
    "items after the last": ["Submit", 5, "a", *LISTS],
    "a prompt": ["Submit", 5, [1] * (MAX_PROMPT + 1)],
    "biases": ["Submit", 5, "a", {"logit_bias": dict.fromkeys(range(1 << 17), 1.0)}],
    "stop ids": ["Submit", 5, "a", {"stop_token_ids": [1] * 300_000}],
    "a mix": ["Submit", 5, "a", {}, {str(n): 1.0 for n in range(100_000)}],
    "unknown parameters": ["Submit", 5, "a", {"unknown": LISTS}],
    "an unknown message": ["Exec", 5, LISTS],
}


@pytest.mark.parametrize("name", HOSTILE)
def test_nothing_is_made_of_what_a_large_frame_holds(name: str, address: str) -> None:
    frame = msgspec.msgpack.encode(HOSTILE[name])

    async def work() -> None:
        async with opened(Fake(), address, max_frame=8 << 20) as (_, host):
            one = host()
            tracemalloc.start()
            await one.send(frame)
            refusal = await one.receive()
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            assert isinstance(refusal, Failure)
            assert (refusal.id, refusal.kind) == (5, "invalid_request_error")
            assert peak < 2 * len(frame) + 100_000

    run(work)


def test_commands_are_answered(address: str) -> None:
    fake = Fake("sql")

    async def work() -> None:
        async with opened(fake, address) as (_, host):
            one = host()
            await one.send(Command(id=1, call="list"))
            answer = await one.receive()
            assert isinstance(answer, Answer)
            assert [card.name for card in answer.adapters] == ["sql"]
            await one.send(Command(id=2, call="info"))
            answer = await one.receive()
            assert isinstance(answer, Answer)
            assert msgspec.msgpack.decode(answer.info["served_model_names"]) == ["base"]
            for call, reason in (
                ("load", "must be provided"),
                ("unload", "cannot be found"),
                ("pin", "cannot be found"),
                ("unpin", "cannot be found"),
            ):
                await one.send(Command(id=3, call=call, lora_name="x"))
                failure = await one.receive()
                assert isinstance(failure, Failure)
                assert reason in failure.message

    run(work)


def test_a_silent_host_is_dropped_and_a_pinging_one_is_not(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zmq_server, "SILENT_SECONDS", 0.3)
    monkeypatch.setattr(zmq_server, "CHECK_SECONDS", 0.05)
    fake = Fake()

    async def work() -> None:
        async with opened(fake, address) as (server, host):
            silent, alive = host(), host()
            await silent.send(Submit(id=1, prompt="hello"))
            await until(lambda: len(fake.generates) == 1)
            await alive.send(Submit(id=1, prompt="world"))
            await until(lambda: len(fake.generates) == 2)
            while not fake.aborted:
                await alive.send(Ping())
                await asyncio.sleep(0.05)
            assert fake.aborted == [fake.generates[0].request_id]
            assert (server.open_calls, fake.front.router.open) == (1, 1)

    run(work)


def test_a_server_that_cannot_watch_its_clients_ends(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("no watch")

    monkeypatch.setattr(zmq_server, "SILENT_SECONDS", 0.1)
    monkeypatch.setattr(zmq_server, "CHECK_SECONDS", 0.05)
    monkeypatch.setattr(ZmqServer, "_drop_silent", broken)
    fake = Fake()

    async def work() -> None:
        context = zmq.asyncio.Context()
        server, host = ZmqServer(context, address, fake.front), Host(context, address)
        await host.send(Ping())
        try:
            with pytest.raises(RuntimeError, match="no watch"):
                await asyncio.wait_for(server.serve(), 5)
        finally:
            host.close()
            server.close()
            await asyncio.sleep(0)
            context.term()

    run(work)


def test_an_answer_larger_than_a_frame_is_a_failure(address: str) -> None:
    fake = Fake()

    async def work() -> None:
        async with opened(fake, address) as (_, host):
            one = host()
            await one.send(Submit(id=1, prompt="hello"))
            await until(lambda: fake.generates)
            fake.say_text(fake.generates[0].request_id, "wide " * 20_000, finish="length")
            failure = await one.receive()
            assert isinstance(failure, Failure)
            assert "frame bound" in failure.message

    run(work)


def test_a_host_that_was_silent_too_long_gets_a_failure(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host whose event loop stalled gets a Failure for the call that was aborted meanwhile."""
    monkeypatch.setattr(zmq_server, "SILENT_SECONDS", 0.1)
    monkeypatch.setattr(zmq_server, "CHECK_SECONDS", 0.05)
    fake = Fake()

    async def work() -> None:
        async with opened(fake, address) as (server, host):
            one = host()
            await one.send(Submit(id=3, prompt="hello"))
            failure = await one.receive()
            assert isinstance(failure, Failure)
            assert (failure.id, failure.kind) == (3, "service_unavailable")
            await until(lambda: server.open_calls == 0)
            await one.send(Submit(id=4, prompt="hello"))
            await until(lambda: len(fake.generates) == 2)

    run(work)
