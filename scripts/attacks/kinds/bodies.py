"""Bodies that cost far more to hold or to decode than to send. Each is refused, or decoded within bounds."""

from __future__ import annotations

import asyncio
import gzip
import random
import zlib
from functools import cache

from attacks.kind import Broken, kind
from attacks.target import Target, all_of

MIB = 1 << 20
ROUTES = ("/generate", "/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")


SHAPES: dict[str, tuple[bytes, bytes, bytes]] = {
    "lists of ids": (b'{"input_ids":[', b"[],", b"[]]}"),
    "lists of lists": (b'{"prompt":[', b"[[]],", b"[1]]}"),
    "texts": (b'{"text":[', b'"",', b'""]}'),
    "prompts": (b'{"prompt":[', b'"",', b'""]}'),
    "ids": (b'{"input_ids":[', b"1,", b"1]}"),
    "floats": (b'{"input_ids":[', b"1e0,", b"1]}"),
    "tokens": (b'{"tokens":[', b"7,", b"7]}"),
    "messages": (b'{"messages":[', b'{"role":"user","content":""},', b'{"role":"user","content":""}]}'),
    "empty messages": (b'{"messages":[', b"{},", b"{}]}"),
    "parts": (b'{"messages":[{"role":"user","content":[', b'{"type":"text","text":""},', b"{}]}]}"),
    "stops": (b'{"prompt":"a","stop":[', b'"ab",', b'"ab"]}'),
    "stop ids": (b'{"prompt":"a","stop_token_ids":[', b"5,", b"5]}"),
    "adapters": (b'{"text":"a","lora_path":[', b"null,", b"null]}"),
    "ignored": (b'{"prompt":"a","metadata":[', b"[],", b"[]]}"),
    "unknown": (b'{"prompt":"a","unknown":[', b"{},", b"{}]}"),
    "rids": (b'{"text":"a","rid":[', b'"",', b'""]}'),
    "deep lists": (b'{"prompt":', b"[", b""),
    "deep objects": (b'{"messages":', b'{"a":', b"1"),
    "long number": (b'{"prompt":', b"9", b"}"),
    "long text": (b'{"prompt":"', b"a ", b'"}'),
    "long key": (b'{"', b"a", b'":1}'),
    "escapes": (b'{"prompt":"', b"\\u0000", b'"}'),
    "doubled keys": (b"{", b'"prompt":"a",', b'"prompt":"b"}'),
    "biases": (b'{"prompt":"a","logit_bias":{', b'"5":1,', b'"6":1}}'),
}
"""The beginning, the repeated part and the end of bodies whose parts are many, deep or wide."""


def shaped(name: str, size: int) -> bytes:
    """Returns the body of this shape that has about `size` bytes."""
    head, piece, tail = SHAPES[name]
    return head + piece * ((size - len(head) - len(tail)) // len(piece)) + tail


@cache
def bomb(name: str) -> bytes:
    """Returns a gzip body of some kilobytes that unpacks to 31 MiB of this shape, made once."""
    return gzip.compress(shaped(name, 31 * MIB), 1)


@kind("bodies.gzip_shapes")
async def gzip_shapes(target: Target, draw: random.Random) -> None:
    """A gzip body of some kB that unpacks to 31 MiB of lists, objects, texts or depth."""
    data = await asyncio.to_thread(bomb, draw.choice([*SHAPES]))
    await all_of(*(
        target.call(draw.choice(ROUTES), data, headers={"Content-Encoding": "gzip"}, may_cut=True) for _ in range(3)
    ))  # fmt: skip


@kind("bodies.gzip_bomb")
async def gzip_bomb(target: Target, draw: random.Random) -> None:
    """Packed bodies that unpack to gigabytes, that are packed twice, cut, false or of another encoding."""
    zeros = await asyncio.to_thread(gzip.compress, bytes(64 * MIB), 9)
    sound = b'{"prompt":"a","max_tokens":1}'
    cases = [
        ("gzip", zeros * 16), ("gzip", gzip.compress(zeros)), ("deflate", zlib.compress(bytes(64 * MIB))),
        ("gzip", zeros[:-9]), ("gzip", b"\x1f\x8b" + draw.randbytes(5000)), ("gzip", gzip.compress(sound) * 3),
        ("gzip, gzip", gzip.compress(gzip.compress(sound))), ("br", sound), ("zstd", draw.randbytes(100)),
        ("gzip", sound), ("gzip", b""), ("x" * 5000, sound),
    ]  # fmt: skip
    encoding, data = draw.choice(cases)
    head = {"Content-Encoding": encoding}
    answer = await target.call("/v1/completions", data, headers=head, expect=range(200, 504), may_cut=True)
    if answer.status in (500, 501, 502):
        raise Broken(f"Content-Encoding {encoding[:20]}, {len(data)} bytes: {answer.status} {answer.text[:200]}")


@kind("bodies.shapes")
async def plain_shapes(target: Target, draw: random.Random) -> None:
    """A plain body of 1 to 31 MiB of lists, objects, texts or depth."""
    name = draw.choice([*SHAPES])
    data = shaped(name, draw.choice([1, 4, 31]) * MIB)
    answer = await target.call(draw.choice(ROUTES), data, may_cut=True)
    if answer.status == 200 and name.startswith("deep"):
        raise Broken(f"{name}: accepted")


@kind("bodies.too_large")
async def too_large(target: Target, draw: random.Random) -> None:
    """Bodies above 32 MiB, told or not told by their length: 413 at once."""
    data = b'{"prompt":"' + b"a" * (40 * MIB)
    await target.call("/v1/completions", data, expect=(413, 503), may_cut=True)
    head = f"POST /generate HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {target.config.keys['attacker']}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {draw.choice([33 * MIB, 1 << 40, (1 << 63) - 1])}\r\n"
    answer = await target.exchange(f"{head}Connection: close\r\n\r\n".encode() + b"{" * 4096)
    if not answer.startswith((b"HTTP/1.1 413", b"HTTP/1.1 503", b"HTTP/1.1 400", b"HTTP/1.1 408")):
        raise Broken(f"a length above 32 MiB: {answer[:200]!r}")


async def unfinished(target: Target, data: bytes, seconds: float, **headers: str) -> None:
    """Sends a request without its last bytes and holds the connection open."""
    try:
        async with asyncio.timeout(seconds), target.connect() as (reader, writer):
            writer.write(data)
            await writer.drain()
            answer = await reader.read(4096)
            target.statuses["cut" if not answer else f"{answer[9:10].decode('ascii', 'replace')}xx"] += 1
    except TimeoutError:
        target.statuses["left"] += 1
    except OSError:
        target.statuses["cut"] += 1


@kind("bodies.unfinished_gzip")
async def unfinished_gzip(target: Target, draw: random.Random) -> None:
    """Sixty gzip bodies of 31 MiB whose last bytes do not come."""
    data = await asyncio.to_thread(bomb, draw.choice([*SHAPES]))
    request = target.request("/generate", data, Content_Encoding="gzip")[:-8]
    await all_of(*(unfinished(target, request, draw.uniform(2, 6)) for _ in range(60)))


@kind("bodies.unfinished")
async def unfinished_plain(target: Target, draw: random.Random) -> None:
    """Forty plain bodies of 24 MiB whose last bytes do not come."""
    request = target.request("/generate", b'{"text":"' + b"a" * (24 * MIB))[:-8]
    await all_of(*(unfinished(target, request, draw.uniform(2, 6)) for _ in range(40)))


@kind("bodies.unfinished_without_key")
async def unfinished_without_key(target: Target, draw: random.Random) -> None:
    """Bodies of callers without a right key, finished or not: 401, and nothing is held for them."""
    request = target.request("/generate", b'{"text":"' + b"a" * (16 * MIB))
    request = request.replace(target.config.keys["attacker"].encode(), b"wrong", 1)
    await all_of(*(unfinished(target, request[: -draw.choice([1, 8])], draw.uniform(1, 4)) for _ in range(20)))
