"""Clients and strangers on the sockets of the run directory, as the same user: nonsense is refused with a log line."""

from __future__ import annotations

import asyncio
import random
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import msgspec
import zmq
import zmq.asyncio
from fixtures.adapters.mutations import Mutator

from attacks.kind import Broken, kind
from attacks.target import Target
from engine.messages import Cancel, Command, Failure, Ping, SamplingParams, Submit, ToClient

ENCODE = msgspec.msgpack.Encoder().encode
DECODER = msgspec.msgpack.Decoder(ToClient)
SAMPLES: list[msgspec.Struct] = [
    Submit(id=1, prompt="hello", params=SamplingParams(max_tokens=3), lora={"poet": 0.5}, tenant="me"),
    Submit(id=2, prompt=[9, 10, 11], params=SamplingParams(max_tokens=3, n=2, stop=["x"]), lora="poet"),
    Command(id=3, call="list"), Command(id=4, call="info"), Cancel(1), Ping(3),
]  # fmt: skip
FALSE = [
    b"", b"\x00", b"\x91" * 100_000, b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff",
    b"\x96\xa6Submit\x01" + b"\x91" * 5000 + b"\x01", b"\x92\xa5Stats\xdd\x7f\xff\xff\xff", b"\xa3abc", b"\xc1",
]  # fmt: skip


def nonsense(draw: random.Random) -> bytes:
    """Draws a frame that is no message, or a message with something changed."""
    mutator = Mutator(draw.randrange(1 << 30))
    encoded = ENCODE(draw.choice(SAMPLES))
    which = draw.random()
    if which < 0.4:
        return mutator.raw(encoded)
    if which < 0.7:
        with suppress(OverflowError, TypeError, UnicodeEncodeError, msgspec.MsgspecError):
            return ENCODE(mutator.tree(msgspec.msgpack.decode(encoded)))
    return draw.choice([*FALSE, draw.randbytes(draw.randrange(1, 300))])


@asynccontextmanager
async def joined(address: str, of: int = zmq.DEALER) -> AsyncIterator[zmq.asyncio.Socket]:
    """Connects a socket without bounds; leaves without waiting for what is unsent."""
    context = zmq.asyncio.Context()
    client = context.socket(of)
    for option in (zmq.SNDHWM, zmq.RCVHWM):
        client.setsockopt(option, 0)
    client.connect(address)
    try:
        yield client
    finally:
        context.destroy(linger=0)


async def answered(target: Target) -> None:
    """Checks that a sound client is answered."""
    async with joined(target.config.zmq_address) as client:
        await client.send(ENCODE(Command(id=7, call="list")))
        try:
            async with asyncio.timeout(30):
                while getattr(answer := DECODER.decode(await client.recv()), "id", None) != 7:
                    pass
        except TimeoutError as error:
            if target.config.faults:
                return
            raise Broken("an embedded client gets no answer within 30 s") from error
        target.statuses["5xx" if isinstance(answer, Failure) else "2xx"] += 1


@kind("clients.nonsense")
async def nonsense_frames(target: Target, draw: random.Random) -> None:
    """Five hundred frames of nonsense on the socket of clients, in one or several parts."""
    async with joined(target.config.zmq_address) as client:
        for _ in range(500):
            parts = [nonsense(draw) for _ in range(draw.choice([1, 1, 1, 2, 5]))]
            await client.send_multipart(parts)
        await asyncio.sleep(0.2)
    await answered(target)


@kind("clients.huge")
async def huge_frames(target: Target, draw: random.Random) -> None:
    """Frames of 1 to 200 MB, sound or not, on the socket of clients; the largest are above its bound."""
    size = draw.choice([1, 8, 200]) << 20
    data = draw.choice([bytes(size), b"\x91" * size, ENCODE(Submit(id=1, prompt="a " * (size // 2)))])
    async with joined(target.config.zmq_address) as client:
        await client.send(data, copy=False)
        await asyncio.sleep(draw.uniform(0.2, 2))
    await answered(target)


@kind("clients.silent")
async def silent(target: Target, draw: random.Random) -> None:
    """Clients that submit, read nothing and send no sign of life: their requests end, their answers are not kept."""
    async with joined(target.config.zmq_address) as client:
        for id in range(12):
            params = SamplingParams(max_tokens=400, ignore_eos=True, logprobs=draw.choice([None, 20]))
            await client.send(
                ENCODE(Submit(id=id, prompt=[9, 10, 11], params=params, lora=draw.choice([None, "poet"])))
            )
        await asyncio.sleep(draw.uniform(1, 8))
    await answered(target)


@kind("clients.strangers")
async def strangers(target: Target, draw: random.Random) -> None:
    """Nonsense, halves of frames and silence on each socket of the run directory."""
    paths = [path for path in target.run_directory.iterdir() if path.is_socket()]
    for path in paths:
        async with joined(f"ipc://{path}", draw.choice([zmq.PUSH, zmq.DEALER])) as client:
            for _ in range(50):
                with suppress(zmq.Again):  # the server takes no client of this kind, so a send would wait for ever
                    await client.send(nonsense(draw), zmq.DONTWAIT)
            await asyncio.sleep(0.1)
    await asyncio.to_thread(halves, paths, draw)
    await answered(target)


def halves(paths: list[Path], draw: random.Random) -> None:
    """Speaks ZeroMQ's protocol to each socket, in part."""
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(16) + bytes(32)
    ready = b"\x04\x19\x05READY\x0bSocket-Type\x00\x00\x00\x04PUSH"
    for path in paths:
        for data in (b"", greeting[:20], greeting + ready, greeting + ready + b"\x02" + struct.pack(">Q", 1 << 62),
                     greeting + ready + b"\x02" + struct.pack(">Q", 1000) + b"half", draw.randbytes(300)):  # fmt: skip
            with socket.socket(socket.AF_UNIX) as client:
                client.settimeout(2.0)
                with suppress(OSError):
                    client.connect(str(path))
                    client.sendall(data)
