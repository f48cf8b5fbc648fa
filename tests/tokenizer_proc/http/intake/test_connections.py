"""Connections: their limits, the deadline of a head, half-closed clients, and files that cannot be opened."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import resource
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import uvloop
from fixtures.connections.raw_http import call, head, served, until
from fixtures.serving.fake_frontend import FakeFrontend

from tokenizer_proc.http.intake import connection_limits
from tokenizer_proc.http.intake.connection_limits import ConnectionLimits, allowed_by_files, network

LOOPS = [asyncio.run, uvloop.run]
TEXT = {"text": "a"}
GET = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"


class Line:
    """A connection that is idle or not."""

    def __init__(self, limits: ConnectionLimits, is_idle: bool = False) -> None:
        self.limits, self.is_idle, self.is_closed = limits, is_idle, False

    def close_idle(self) -> None:
        self.is_closed = True
        self.limits.leave(self)

    def check_head(self, now: float) -> None: ...


def enter(limits: ConnectionLimits, peer: str, count: int, is_idle: bool = False) -> list[Line]:
    """Returns the connections that were admitted."""
    lines = [Line(limits, is_idle) for _ in range(count)]
    return [line for line in lines if limits.enter(line, peer) is None]


def test_connections_are_limited_by_address_and_in_all() -> None:
    limits = ConnectionLimits(40, None)
    assert len(enter(limits, "10.0.0.1", 20)) == 10
    assert len(enter(limits, "10.0.0.2", 20)) == 10
    assert len(enter(limits, "2001:db8::1", 5)) == len(enter(limits, "2001:db8::2", 5)) == 5
    assert len(enter(limits, "2001:db8::3", 5)) == 0
    assert len(enter(limits, "127.0.0.1", 20)) == 10
    assert len(limits) == 40
    assert len(enter(ConnectionLimits(40, None), "127.0.0.1", 50)) == 40
    assert len(enter(ConnectionLimits(40, 3), "::1", 50)) == 3


def test_an_idle_connection_makes_room_for_a_new_one() -> None:
    limits = ConnectionLimits(8, 4)
    busy, idle = enter(limits, "10.0.0.1", 2), enter(limits, "10.0.0.1", 2, is_idle=True)
    assert len(enter(limits, "10.0.0.1", 3)) == 2
    assert [line.is_closed for line in busy + idle] == [False, False, True, True]
    others = enter(limits, "10.0.0.2", 4, is_idle=True)
    assert len(enter(limits, "10.0.0.3", 1)) == 1
    assert [line.is_closed for line in others] == [True, False, False, False]
    for line in busy:
        limits.leave(line)
        limits.leave(line)
    assert len(limits) == 6


def test_addresses_of_one_network_count_as_one() -> None:
    assert network("2001:db8:0:1::1") == network("2001:db8:0:1:ffff::2") != network("2001:db8:0:2::1")
    assert network("::ffff:10.0.0.1") == network("10.0.0.1") == "10.0.0.1"
    assert network("fe80::1%eth0") == network("fe80::2")
    assert network("::1") == "::1"
    assert network(None) == "127.0.0.1"


def test_open_files_bound_the_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    limit = [256, 4096]
    monkeypatch.setattr(resource, "getrlimit", lambda _: tuple(limit))
    monkeypatch.setattr(resource, "setrlimit", lambda _, new: limit.__setitem__(slice(None), new))
    assert allowed_by_files(50) <= 50
    assert limit[0] < 1024
    assert 3000 < allowed_by_files(8192) < 4096 - connection_limits.RESERVED_FILES
    assert limit == [4096, 4096]
    limit[:] = [64, 64]
    assert allowed_by_files(8192) == 1


@pytest.mark.parametrize("run", LOOPS)
def test_connections_above_the_limit_get_a_503(run: Callable[[Awaitable[None]], None]) -> None:
    async def main() -> None:
        front = FakeFrontend()
        front.hold_after = 1
        async with served(front, max_connections=3) as server:
            busy = [await server.connect() for _ in range(3)]
            for one in busy:
                await one.send(call("/generate", TEXT))
            await until(lambda: len(front.submits) == 3)
            refused = await server.connect()
            await refused.send(GET)
            answer = await refused.answer()
            assert (answer.status, answer.headers["retry-after"]) == (503, "1")
            assert "--max-connections" in answer.message
            assert await refused.rest() == b""
            await busy[0].close()
            await until(lambda: server.open_connections == 2)
            late = await server.connect()
            await late.send(GET)
            assert (await late.answer()).status == 200
            later = await server.connect()  # `late` is idle, and is closed for it
            await later.send(GET)
            assert (await later.answer()).status == 200
            assert await late.rest() == b""

    run(main())


@pytest.mark.parametrize("run", LOOPS)
@pytest.mark.parametrize("sent", [b"", b"POST /generate HTTP/1.1\r\nHost", GET + b"GET /hea"])
def test_a_head_that_does_not_arrive_is_a_408(run: Callable[[Awaitable[None]], None], sent: bytes) -> None:
    async def main() -> None:
        async with served(FakeFrontend(), read_timeout=0.2) as server:
            slow = await server.connect()
            if sent.startswith(GET):
                await slow.send(GET)
                assert (await slow.answer()).status == 200
            await slow.send(sent.removeprefix(GET))
            answer = await slow.answer()
            assert (answer.status, answer.message) == (408, "the request arrives too slowly")
            assert await slow.rest() == b""
            await until(lambda: not server.open_connections)

    run(main())


def test_an_idle_connection_outlives_the_read_timeout() -> None:
    async def main() -> None:
        async with served(FakeFrontend(), read_timeout=0.1) as server:
            client = await server.connect()
            for _ in range(2):
                await client.send(GET)
                assert (await client.answer()).status == 200
                await asyncio.sleep(0.4)

    asyncio.run(main())


@pytest.mark.parametrize("run", LOOPS)
@pytest.mark.parametrize("path", ["/generate", "/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_half_closed_client_gets_its_answer(run: Callable[[Awaitable[None]], None], path: str, stream: bool) -> None:
    async def main() -> None:
        front = FakeFrontend()
        async with served(front) as server:
            client = await server.connect()
            prompt: dict[str, Any] = {"text": "a", "prompt": "a", "messages": [{"role": "user", "content": "a"}]}
            name = {"/generate": "text", "/v1/completions": "prompt"}.get(path, "messages")
            await client.send(call(path, {name: prompt[name], "stream": stream}))
            client.writer.write_eof()
            answer = await client.answer()
            assert answer.status == 200
            assert (b"data: [DONE]" in answer.body) == stream
            assert b"Hi" in answer.body or stream
            assert await client.rest() == b""
            await until(lambda: not server.open_connections)
            assert front.left == 1

    run(main())


@pytest.mark.parametrize("run", LOOPS)
def test_all_requests_of_a_half_closed_client_are_answered(run: Callable[[Awaitable[None]], None]) -> None:
    async def main() -> None:
        async with served(FakeFrontend()) as server:
            client = await server.connect()
            await client.send(call("/generate", TEXT) * 5 + GET)
            client.writer.write_eof()
            found = await client.rest()
            assert found.count(b"HTTP/1.1 200 OK") == 6

    run(main())


@pytest.mark.parametrize("run", LOOPS)
def test_few_pipelined_requests_are_read_ahead(run: Callable[[Awaitable[None]], None]) -> None:
    async def main() -> None:
        front = FakeFrontend()
        front.hold_after = 1
        async with served(front) as server:
            client = await server.connect()
            sending = asyncio.ensure_future(client.send(call("/generate", TEXT | {"rid": "r" * 60_000}) * 100 + GET))
            await until(lambda: front.submits)
            await asyncio.sleep(0.3)
            connection = next(iter(server.server.limits.connections))  # type: ignore[union-attr]
            waiting = [body.total_bytes for _, body in connection._messages]  # type: ignore[attr-defined]
            assert 0 < len(waiting) <= 8
            assert len(front.submits) == 1
            front.hold_after = None
            front.streams[0].cancel()
            for _ in range(100):
                assert (await client.answer()).status == 200
            await sending
            assert (await client.answer()).status == 200

    run(main())


@pytest.mark.parametrize("run", LOOPS)
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_closes_wholly_is_noticed(
    run: Callable[[Awaitable[None]], None], stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        front = FakeFrontend()
        front.hold_after = 1
        async with served(front) as server:
            client = socket.create_connection(("127.0.0.1", server.port))
            client.sendall(call("/generate", TEXT | {"stream": stream}))
            await until(lambda: front.submits)
            await asyncio.sleep(0.1)
            while stream and b"data:" not in client.recv(1 << 16):
                pass
            client.close()
            await until(lambda: front.left == 1)
            await until(lambda: not server.open_connections)

    with caplog.at_level(logging.WARNING):
        run(main())
    assert not caplog.records


def test_a_body_that_ends_early_closes_the_connection() -> None:
    async def main() -> None:
        async with served(FakeFrontend()) as server:
            client = await server.connect()
            await client.send(head("/generate", 100) + b'{"text":')
            client.writer.write_eof()
            assert await client.rest() == b""
            await until(lambda: not server.open_connections)

    asyncio.run(main())


@pytest.mark.parametrize("run", LOOPS)
def test_without_files_to_open_the_server_goes_on(run: Callable[[Awaitable[None]], None]) -> None:
    """Nothing is refused for long, and nothing spins, when other files take the descriptors of connections."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    async def main() -> None:
        async with served(FakeFrontend()) as server:
            keeper = await server.connect()
            await keeper.send(GET)
            assert (await keeper.answer()).status == 200
            used = max(map(int, os.listdir("/proc/self/fd")))
            resource.setrlimit(resource.RLIMIT_NOFILE, (used + 8, hard))
            try:
                clients = open_until_none_is_left(server.port)
                await asyncio.sleep(0.1)
                await keeper.send(GET)
                assert (await keeper.answer()).status == 200
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for client in clients:
                client.close()
            late = await server.connect()
            await late.send(GET)
            assert (await late.answer()).status == 200

    run(main())


def open_until_none_is_left(port: int) -> list[socket.socket]:
    clients: list[socket.socket] = []
    with contextlib.suppress(OSError):
        while True:
            clients.append(socket.create_connection(("127.0.0.1", port)))
    assert clients
    return clients


def test_no_file_descriptors_is_a_503(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        front = FakeFrontend()
        front.refusal = OSError(24, "Too many open files")
        async with served(front) as server:
            client = await server.connect()
            await client.send(call("/generate", TEXT))
            answer = await client.answer()
            assert answer.status == 503
            assert json.loads(answer.body)["error"]["type"] == "overloaded_error"

    asyncio.run(main())
