"""Mutated frames on the inboxes and the ZeroMQ server: each is refused with a log line, or is a valid message."""

from __future__ import annotations

import asyncio
import resource
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
import zmq.asyncio
from fixtures.adapters.mutations import Mutator
from fixtures.serving.scripted_scheduler import ScriptedScheduler

from engine import messages
from engine.ipc import AsyncInbox, Inbox
from engine.messages import (
    AdapterCard,
    AdapterState,
    Capacity,
    ChatMessage,
    Chunk,
    Command,
    Delta,
    Fill,
    Footprint,
    Generate,
    Hello,
    LanePages,
    LogprobIds,
    NewRow,
    Ping,
    PositionLogprobs,
    Progress,
    RunnerReady,
    Sampling,
    SamplingParams,
    Stats,
    Step,
    StepDone,
    Stopping,
    Submit,
    TokenLogprob,
    Update,
    Usage,
)
from tokenizer_proc.zmq_server import ZmqServer

CASES = 10_000
INBOXES = ("ToTokenizer", "ToScheduler", "ToRunner", "ToZmqServer", "ToClient")

LOGPROB = LogprobIds(5, -1.5, [(5, -1.5), (6, -2.0)])
SAMPLING = Sampling(
    temperature=0.5,
    seed=7,
    end_ids=[1],
    logit_bias=[(3, 0.5)],
    logprobs=2,
    allowed_token_ids=[3],
    bad_words=[[1, 2]],
    token_ids_logprob=[4],
)
CAPACITY = Capacity(
    kv_pages=8, page_size=4, rows=2, max_length=32, max_batched_tokens=8, vocab_size=9, rank_pages={"qkv": 2}
)
PARAMS = SamplingParams(max_tokens=3, n=2, stop=["x"], logit_bias={5: 1.5}, logprobs=1, stop_token_ids=[7])
TOKEN = TokenLogprob(5, -1.0, "a", [97])
RICH: list[msgspec.Struct] = [
    Generate(epoch=0, request_id=3, prompt=[1, 2], generated=[3], lora=[(1, 0.5)], sampling=SAMPLING,
             stopping=Stopping(5, 1, [1]), cache_salt="me"),
    Submit(id=1, prompt="hello", params=PARAMS, lora={"sql": 0.5}, chat_template_kwargs={"a": 1}, tenant="me"),
    Submit(id=2, prompt=[1, 2, 3], params=PARAMS, lora="sql"),
    Submit(id=3, prompt=[ChatMessage("user", "hi", "me")], default_max_tokens=4),
    Command(id=9, call="info"),
    Delta(id=1, text="a", token_ids=[5], stop_reason="x", usage=Usage(1, 2), prompt_token_ids=[1],
          logprobs=[PositionLogprobs(TOKEN, [TOKEN])], prompt_logprobs=[None]),
    messages.Answer(id=1, adapters=[AdapterCard(name="a", adapter_id=1, path="p", root="r", parent="b")],
                    info={"a": msgspec.Raw(msgspec.msgpack.encode([1, {"b": 2}]))}),
    Progress(0, [Update(request_id=3, index=1, tokens=[5], finish="stop", logprobs=[LOGPROB])]),
    AdapterState(adapter_id=1, state="host", footprint=Footprint({"qkv": 1}), target_modules=["q_proj"]),
    RunnerReady(epoch=1, capacity=CAPACITY),
    CAPACITY,
    Stats(resident=[1], running_adapters={1: 2}, step_seconds=[0.5]),
    Step(epoch=0, id=1, fills=[Fill(1, {"qkv": [0]})], lanes=[LanePages(1, {"qkv": [(0, 1.0)]})],
         new_rows=[NewRow(row=0, generation=1, prompt_length=2, sampling=SAMPLING, history=[1])],
         chunks=[Chunk(row=0, generation=1, start=0, length=2, tokens=[1, 2], pages=[1])]),
    StepDone(epoch=0, id=1, tokens=[5], logprobs={0: LOGPROB}, prompt_logprobs={0: [LOGPROB]}),
    Hello("scheduler", 1, "ipc://x"),
]  # fmt: skip
PLAIN: list[msgspec.Struct] = [
    messages.Abort(0, 3), messages.LoadAdapter(adapter_id=1, path="a"), messages.UnloadAdapter(1), Ping(3),
    messages.PinAdapter(1, True), messages.EvictAdapter(1), messages.Reset(1), messages.Cancel(1),
    messages.Failure(1, "k", "m"),
]  # fmt: skip


def kinds(inbox: str) -> tuple[type[msgspec.Struct], ...]:
    return typing.get_args(getattr(messages, inbox))


def sound(inbox: str) -> list[msgspec.Struct]:
    """Returns valid messages of this inbox, at least one of each kind."""
    found = [each for each in RICH + PLAIN if isinstance(each, kinds(inbox))]
    assert {type(each) for each in found} == set(kinds(inbox))
    return found


def frame(mutator: Mutator, samples: list[msgspec.Struct]) -> bytes:
    """Draws a mutated frame; few of these frames are valid messages."""
    encoded = msgspec.msgpack.encode(mutator.draw.choice(samples))
    what = mutator.draw.random()
    if what < 0.45:
        return mutator.raw(encoded)
    if what < 0.93:
        return msgspec.msgpack.encode(mutator.tree(msgspec.msgpack.decode(encoded)))
    if what < 0.95:
        return mutator.draw.randbytes(mutator.draw.randrange(200))
    return mutator.draw.choice([
        b"\x91" * 100_000,  # deep nesting
        encoded[:1] + encoded[1:-1] + b"\x91" * 5000 + b"\x01",
        b"\x96\xa6Submit\x01" + b"\x91" * 5000 + b"\x01",
        b"\x93\xa6Answer\x01\x90\x81\xa1a" + b"\x91" * 5000 + b"\x01",
        b"\xdd\xff\xff\xff\xff",  # false lengths
        b"\xdf\xff\xff\xff\xff",
        b"\x92\xa5Stats\xdd\x7f\xff\xff\xff",
        encoded.replace(b"\x92", b"\xdd\xff\xff\xff\xff", 1),
        encoded.replace(b"\xa1", b"\xa1\xff", 1),  # invalid UTF-8
        b"\x92\xa5Abort\xd6\xff\x00\x00\x00\x00",
        b"",
    ])  # fmt: skip


@pytest.fixture(autouse=True)
def _bounded_memory(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Asserts that no memory is allocated for the elements of a frame that claims a billion of them."""
    caplog.set_level("CRITICAL", "engine.ipc")
    caplog.set_level("CRITICAL", "tokenizer_proc.zmq_server")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10, "more than 100 MiB"


@pytest.mark.parametrize("name", INBOXES)
def test_inbox_refuses_mutated_frames(name: str) -> None:
    mutator, samples, allowed = Mutator(INBOXES.index(name)), sound(name), kinds(name)
    context: zmq.Context[Any] = zmq.Context()
    inbox: Inbox[Any] = Inbox(context, f"inproc://{name}", getattr(messages, name))
    push = context.socket(zmq.PUSH)
    push.setsockopt(zmq.SNDHWM, 0)
    push.connect(f"inproc://{name}")
    taken = 0
    try:
        for _ in range(CASES):
            push.send(frame(mutator, samples))
            for message in inbox.receive(0):
                assert isinstance(message, allowed)
                msgspec.msgpack.encode(message)
                taken += 1
        assert CASES * 0.02 < taken < CASES * 0.6, f"{taken} were valid: the cases are badly mixed"
        for each in samples:
            push.send(msgspec.msgpack.encode(each))
        assert list(inbox.receive(1)) == samples
    finally:
        push.close()
        inbox.close()
        context.term()


def test_async_inbox_goes_on_after_mutated_frames(tmp_path: Path) -> None:
    mutator, samples = Mutator(21), sound("ToTokenizer")

    async def main() -> None:
        context = zmq.asyncio.Context()
        inbox: AsyncInbox[Any] = AsyncInbox(context, "inproc://t", messages.ToTokenizer)
        push = context.socket(zmq.PUSH)
        push.connect("inproc://t")
        try:
            for _ in range(500):
                await push.send(frame(mutator, samples))
            last = Hello("scheduler", 1 << 50, "ipc://last")
            await push.send(msgspec.msgpack.encode(last))
            while await asyncio.wait_for(anext(inbox), 10) != last:
                pass
        finally:
            push.close()
            inbox.close()
            context.term()

    asyncio.run(main())


@pytest.mark.parametrize(
    "mutated",
    [
        b"\x94\xa5Hello\xa1\xff\x01\xa1x",  # invalid UTF-8
        b"\x93\xa5Stats" + b"\x91" * 100_000,
        b"\x93\xa8Progress\x00\xdd\xff\xff\xff\xff",
    ],
)
def test_messages_after_an_unreadable_frame_arrive(mutated: bytes) -> None:
    context: zmq.Context[Any] = zmq.Context()
    inbox: Inbox[Any] = Inbox(context, "inproc://once", messages.ToTokenizer)
    push = context.socket(zmq.PUSH)
    push.connect("inproc://once")
    try:
        push.send(mutated)
        push.send(msgspec.msgpack.encode(Hello("scheduler", 1, "ipc://x")))
        assert list(inbox.receive(5)) == [Hello("scheduler", 1, "ipc://x")]
    finally:
        push.close()
        inbox.close()
        context.term()


def test_zmq_server_answers_every_client(tmp_path: Path) -> None:
    """Uses a real ROUTER and front end; at the end no call is open, and every client is served."""
    scheduler = ScriptedScheduler("ok!", "sql")
    frontend = scheduler.frontend(enable_lora=True, max_loras=4)
    mutator, samples = Mutator(22), [each for each in sound("ToZmqServer") if not isinstance(each, Command)]
    samples += [Command(id=9, call=call, lora_name="ghost") for call in ("info", "list", "unload", "pin", "unpin")]

    async def main() -> None:
        context = zmq.asyncio.Context()
        server = ZmqServer(context, f"ipc://{tmp_path}/server", frontend)
        serving = asyncio.ensure_future(server.serve())
        hosts = [context.socket(zmq.DEALER) for _ in range(4)]
        try:
            for host in hosts:
                for option in (zmq.LINGER, zmq.SNDHWM, zmq.RCVHWM):
                    host.setsockopt(option, 0)
                host.connect(f"ipc://{tmp_path}/server")
            for number in range(CASES):
                parts = [frame(mutator, samples)]
                if mutator.draw.random() < 0.01:
                    parts.append(b"")
                await hosts[number % len(hosts)].send_multipart(parts)
                if number % 100 == 0:
                    await _asked(hosts[0], Ping(), Ping)
                    assert not serving.done()
            for host in hosts:
                await _asked(host, Ping(), Ping)
            for host in hosts:  # the next call ends one that is still open
                last = Submit(id=1 << 40, prompt="hi", params=SamplingParams(max_tokens=2))
                assert (await _asked(host, last, Delta, 1 << 40)).id == 1 << 40
            async with asyncio.timeout(20):
                while frontend.router.open or server.open_calls:
                    await asyncio.sleep(0.01)
        finally:
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)
            for host in hosts:
                host.close()
            server.close()
            await asyncio.sleep(0)
            context.term()

    asyncio.run(main())


async def _asked(host: Any, message: msgspec.Struct, kind: type[msgspec.Struct], id: int | None = None) -> Any:
    """Sends a message and reads until a reply of type `kind` (and `id`) comes; a server error fails the test."""
    await host.send(msgspec.msgpack.encode(message))
    while True:
        answer = msgspec.msgpack.decode(await asyncio.wait_for(host.recv(), 20), type=messages.ToClient)
        assert not (isinstance(answer, messages.Failure) and answer.kind == "server_error"), answer
        if isinstance(answer, kind) and (id is None or answer.id == id):
            return answer
