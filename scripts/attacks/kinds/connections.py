"""Connections that are many, slow, idle, cut or never read. Each has a bound, and the streams of others go on."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
from typing import Any

from attacks.kind import Broken, kind
from attacks.target import SOURCE, Target, all_of, status_class, status_of

STREAM: dict[str, Any] = {
    "input_ids": [9, 10, 11], "stream": True, "sampling_params": {"max_new_tokens": 200, "ignore_eos": True},
}  # fmt: skip


async def hold(target: Target, data: bytes, seconds: float, drip: bytes = b"") -> None:
    """Sends bytes, then a byte of `drip` each half second, until the time is over or the server closes."""
    try:
        async with asyncio.timeout(seconds), target.connect() as (reader, writer):
            writer.write(data)
            ended = asyncio.ensure_future(reader.read(4096))
            try:
                for number in range(1000):
                    await asyncio.wait([ended], timeout=0.5)
                    if ended.done():
                        target.statuses[status_class(status_of(ended.result()))] += 1
                        return
                    if drip:
                        writer.write(drip[number % len(drip) : number % len(drip) + 1])
            finally:
                ended.cancel()
    except TimeoutError:
        target.statuses["left"] += 1
    except OSError:
        target.statuses["cut"] += 1


@kind("connections.slow_heads")
async def slow_heads(target: Target, draw: random.Random) -> None:
    """Three hundred heads that arrive a byte each half second."""
    head = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Slow: "
    await all_of(*(hold(target, head, draw.uniform(3, 8), b"abc") for _ in range(300)))


@kind("connections.slow_bodies")
async def slow_bodies(target: Target, draw: random.Random) -> None:
    """Three hundred bodies that arrive a byte each half second, with a length or in chunks."""
    whole = target.request("/v1/completions", b'{"prompt":"' + b"a" * 1000)[:-990]
    chunked = target.request("/v1/completions", b"", Transfer_Encoding="chunked").replace(b"Content-Length: 0\r\n", b"")
    for_each = [(whole, b"a"), (chunked, b"1\r\na\r\n"), (chunked + b"fffffff\r\n", b"a")]
    await all_of(*(hold(target, *(draw.uniform(3, 8) if n == 1 else part for n, part in enumerate(
        (case[0], 0, case[1])))) for case in (draw.choice(for_each) for _ in range(300))))  # fmt: skip


@kind("connections.idle")
async def idle(target: Target, draw: random.Random) -> None:
    """Two thousand connections that send nothing."""
    await all_of(*(hold(target, b"", draw.uniform(2, 6)) for _ in range(2000)))


@kind("connections.pipelined")
async def pipelined(target: Target, draw: random.Random) -> None:
    """Five thousand requests on one connection, sent before the first answer is read, or never read."""
    one = draw.choice([
        b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", b"GET /nowhere HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
        target.request("/generate", {"input_ids": [9], "sampling_params": {"max_new_tokens": 1}}),
        target.request("/tokenize", {"prompt": "a b c"}),
    ])  # fmt: skip
    async with target.connect() as (reader, writer):
        writer.write(one * 5000)
        seen = 0
        with contextlib.suppress(TimeoutError, OSError):
            async with asyncio.timeout(draw.uniform(1, 6)):
                while data := await reader.read(1 << 16):
                    seen += data.count(b"HTTP/1.1 ")
                    if b"HTTP/1.1 500" in data:
                        raise Broken(f"a pipelined request: {data[:200]!r}")
        target.statuses["pipelined"] += seen


@kind("connections.half_closed")
async def half_closed(target: Target, draw: random.Random) -> None:
    """Clients that send their request and close their half at once: they are answered."""
    body = {"input_ids": [9, 10], "sampling_params": {"max_new_tokens": 4, "ignore_eos": True}}
    cases = [
        target.request("/generate", body, Connection="close"),
        target.request("/tokenize", {"prompt": "a b"}, Connection="close"),
        b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n",
    ]
    for data in cases:
        answer = await target.exchange(data, half_close=True)
        if status_of(answer) not in (200, 503) and not target.config.faults:
            raise Broken(f"a half-closed client was answered with {answer[:100]!r}: {data[:40]!r}")


def reset(client: socket.socket) -> None:
    """Closes a socket with a reset."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


@kind("connections.resets")
async def resets(target: Target, draw: random.Random) -> None:
    """Forty streams that are reset while they run."""

    async def one() -> None:
        await asyncio.sleep(draw.uniform(0, 1))
        try:
            client = await asyncio.to_thread(target.socket)
        except OSError:
            target.statuses["refused"] += 1
            return
        try:
            await asyncio.to_thread(client.sendall, target.request("/generate", STREAM))
            await asyncio.sleep(draw.uniform(0, 1))
        except OSError:
            target.statuses["cut"] += 1
        finally:
            reset(client)
        target.statuses["left"] += 1

    await all_of(*(one() for _ in range(40)))


@kind("connections.unread")
async def unread(target: Target, draw: random.Random) -> None:
    """Eight clients that ask for megabytes and read nothing."""
    body = STREAM | {"return_logprob": True, "top_logprobs_num": 20, "stream": draw.random() < 0.7}

    async def one() -> None:
        try:
            client = await asyncio.to_thread(target.socket, 4096)
        except OSError:
            target.statuses["refused"] += 1
            return
        with client:
            try:
                await asyncio.to_thread(client.sendall, target.request("/generate", body))
                await asyncio.sleep(draw.uniform(3, 10))
            except OSError:
                target.statuses["cut"] += 1
        target.statuses["left"] += 1

    await all_of(*(one() for _ in range(8)))


@kind("connections.churn")
async def churn(target: Target, draw: random.Random) -> None:
    """Two thousand connections that are opened and closed as fast as the attacker can, some reset."""

    async def some() -> None:
        loop = asyncio.get_running_loop()
        for _ in range(100):
            client = socket.socket()
            client.setblocking(False)
            client.bind((SOURCE, 0))
            try:
                await loop.sock_connect(client, (target.config.host, target.config.port))
                await loop.sock_sendall(client, draw.choice([b"", b"G", b"GET / HTTP/1.1\r\n\r\n"]))
            except OSError:
                target.statuses["refused"] += 1
            finally:
                reset(client)

    await all_of(*(some() for _ in range(20)))
