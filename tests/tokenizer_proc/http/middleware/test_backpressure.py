"""A client is cut off if too many bytes wait for it, or wait for too long; a client that reads slowly is not."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest
import uvloop
from aiohttp import web
from fixtures.serving.fake_frontend import config
from fixtures.serving.scripted_scheduler import ScriptedScheduler

from tokenizer_proc.frontend import Frontend
from tokenizer_proc.http.app import create_app
from tokenizer_proc.http.intake.memory_budget import MemoryAccount, MemoryBudget
from tokenizer_proc.http.middleware import backpressure
from tokenizer_proc.http.middleware.backpressure import FREE_BYTES, LEAST_BYTES, SlowReader, WriteBuffer

LOOPS = [asyncio.run, uvloop.run]
SCORED = {"input_ids": [1, 2], "return_logprob": True, "top_logprobs_num": 2, "stream": True,
          "sampling_params": {"max_new_tokens": 400, "ignore_eos": True}}  # fmt: skip
"""A request with cumulative events: some MB in total."""


class Pipe:
    """A transport from which the test takes the bytes."""

    def __init__(self) -> None:
        self.waiting = 0

    def set_write_buffer_limits(self, high: int) -> None:
        assert high > 1 << 30

    def get_write_buffer_size(self) -> int:
        return self.waiting


class Sink:
    """A response that is written to a pipe."""

    def __init__(self, pipe: Pipe) -> None:
        self._pipe = pipe

    async def write(self, data: bytes) -> None:
        self._pipe.waiting += len(data)


class Clock:
    """A clock whose time the test sets."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(backpressure, "time", clock)
    return clock


def made(
    max_buffered: int, stall_timeout: float, account: MemoryAccount | None = None
) -> tuple[Pipe, Callable[[int], None]]:
    """Returns a pipe, and a function that writes `size` bytes through a write buffer into it."""
    pipe = Pipe()
    way = WriteBuffer(
        cast(Any, pipe), max_buffered, stall_timeout, account or MemoryAccount(MemoryBudget(1 << 30), "a")
    )

    def write(size: int) -> None:
        asyncio.run(way.write(cast(Any, Sink(pipe)), b"x" * size))

    return pipe, write


def test_buffered_bytes_are_bounded(clock: Clock) -> None:
    pipe, write = made(1000, 60.0)
    for _ in range(12):
        write(100)
    assert pipe.waiting == 1200  # the bound, the largest write, and the last write
    with pytest.raises(SlowReader, match="1200 bytes"):
        write(100)


def test_one_write_may_exceed_the_bound(clock: Clock) -> None:
    pipe, write = made(1000, 60.0)
    write(50_000)
    write(100)
    pipe.waiting -= 40_000
    write(100)
    assert pipe.waiting == 10_200


def test_time_without_reading_is_bounded(clock: Clock) -> None:
    _, write = made(1 << 20, 60.0)
    write(100)
    clock.now = 500.0  # the model was slow, which does not count as the reader's time
    write(100)
    clock.now = 559.0
    write(100)
    clock.now = 561.0
    with pytest.raises(SlowReader, match="0 were read in 61"):
        write(100)


def test_a_slow_reader_that_reads_on_is_served(clock: Clock) -> None:
    pipe, write = made(1 << 20, 60.0)
    write(500_000)
    for _ in range(50):
        clock.now += 30.0
        pipe.waiting -= LEAST_BYTES // 2
        write(500)


def test_a_reader_that_trickles_is_cut_off(clock: Clock) -> None:
    pipe, write = made(1 << 20, 60.0)
    write(500_000)

    def trickle() -> None:
        for _ in range(50):
            clock.now += 5.0
            pipe.waiting -= 10
            write(10)

    with pytest.raises(SlowReader, match="were read"):
        trickle()


def test_a_reader_that_keeps_up_is_never_cut_off(clock: Clock) -> None:
    pipe, write = made(10, 1.0)
    for _ in range(100):
        clock.now += 10.0
        write(1000)
        pipe.waiting = 0


def test_unread_bytes_count_as_memory_for_requests() -> None:
    account = MemoryAccount(MemoryBudget(600_000), "a")
    pipe, write = made(1 << 30, 60.0, account)
    write(FREE_BYTES)
    assert account.held == 0
    write(300_000)
    assert account.held == 300_000
    pipe.waiting = 100_000
    write(0)
    assert account.held == 100_000 - FREE_BYTES
    with pytest.raises(SlowReader, match="max-request-memory"):
        write(400_000)
    pipe.waiting = 0
    write(0)
    assert account.held == 0


# ------------------------------------------------------------------------------------------------ over real sockets


@asynccontextmanager
async def served(frontend: Frontend, **fields: Any) -> AsyncIterator[int]:
    """Serves the app with small kernel buffers, and yields its port."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
    listener.bind(("127.0.0.1", 0))
    runner = web.AppRunner(create_app(frontend, config(**fields)), handler_cancellation=True, access_log=None)
    await runner.setup()
    await web.SockSite(runner, listener).start()
    try:
        yield listener.getsockname()[1]
    finally:
        await runner.cleanup()


async def ask(port: int, body: dict[str, Any], name: str, room: int = 4096) -> socket.socket:
    """Returns a socket that has sent a request and reads nothing; the kernel buffers about `room` bytes for it."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, room)
    client.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(client, ("127.0.0.1", port))
    data = json.dumps(body).encode()
    head = "POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
    await loop.sock_sendall(
        client, head.encode() + f"X-Request-Id: {name}\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data
    )
    return client


async def read(client: socket.socket, pause: float = 0.0) -> bytes:
    """Returns everything that is received; b"" if the connection was cut."""
    parts = []
    try:
        while part := await asyncio.get_running_loop().sock_recv(client, 1 << 16):
            parts.append(part)
            await asyncio.sleep(pause)
    except ConnectionResetError:
        return b""
    finally:
        client.close()
    return b"".join(parts)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


def slow(caplog: pytest.LogCaptureFixture) -> set[str]:
    """Returns the ids of the calls that were cut off."""
    texts = [record.getMessage() for record in caplog.records]
    return {text.split("id=")[1].split()[0] for text in texts if "kind=slow_reader" in text}


@pytest.mark.parametrize("run", LOOPS)
def test_a_client_that_does_not_read_is_cut_off_alone(
    run: Callable[[Awaitable[None]], None], caplog: pytest.LogCaptureFixture
) -> None:
    scheduler = ScriptedScheduler("x" * 450)
    frontend = scheduler.frontend()

    async def main() -> None:
        async with served(frontend, max_stream_buffer=400_000) as port:
            deaf = [await ask(port, SCORED, f"deaf-{n}") for n in range(6)]
            others = [await ask(port, SCORED, f"other-{n}", room=1 << 20) for n in range(2)]
            heard = await asyncio.gather(*map(read, others))
            assert all(b"data: [DONE]" in each for each in heard)
            assert len(heard[0]) > 1_000_000
            await until(lambda: len(slow(caplog)) == 6)
            assert frontend.router.open == 0
            assert len(scheduler.aborted) == 6
            assert await asyncio.gather(*map(read, deaf)) == [b""] * 6

    with caplog.at_level(logging.INFO):
        run(main())
    assert slow(caplog) == {f"deaf-{n}" for n in range(6)}


@pytest.mark.parametrize("run", LOOPS)
@pytest.mark.parametrize("stream", [False, True])
def test_a_finished_answer_waits_for_its_reader_in_bounds(
    run: Callable[[Awaitable[None]], None], stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    frontend = ScriptedScheduler("x" * 450).frontend()
    body = SCORED | {"stream": stream, "input_ids": [[1]] * 16}

    async def main() -> None:
        async with served(frontend, max_stream_buffer=1 << 30, stream_stall_timeout=0.4) as port:
            deaf = await ask(port, body, "deaf")
            await until(lambda: slow(caplog) == {"deaf"})
            assert await read(deaf) == b""
        assert frontend.router.open == 0

    with caplog.at_level(logging.INFO):
        run(main())


def test_a_reader_that_pauses_gets_everything(caplog: pytest.LogCaptureFixture) -> None:
    frontend = ScriptedScheduler("x" * 450).frontend()
    body = SCORED | {"stream": False, "input_ids": [[1]] * 16}

    async def main() -> None:
        async with served(frontend, max_stream_buffer=1000, stream_stall_timeout=5.0) as port:
            answer = await read(await ask(port, body, "late"), pause=0.005)
            assert len(json.loads(answer.partition(b"\r\n\r\n")[2])) == 16

    with caplog.at_level(logging.INFO):
        asyncio.run(main())
    assert not slow(caplog)
