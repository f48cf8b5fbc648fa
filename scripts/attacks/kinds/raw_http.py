"""Bytes that are not HTTP, nearly HTTP, or HTTP for another host. Each is a 4xx or a closed connection."""

from __future__ import annotations

import random

from fixtures.adapters.mutations import Mutator

from attacks.kind import Broken, kind
from attacks.target import CUT, Target, all_of, status_of

HOSTS = [
    "evil.com", "127.0.0.1.evil.com", "127.0.0.1%00.evil.com", "127.0.0.1@evil.com", "evil.com:80",
    "localhost.evil.com", "evil.com#localhost", "[::1].evil.com", "0x7f000001.evil.com",
    "127.0.0.1, evil.com", "169.254.169.254",
]  # fmt: skip


@kind("raw_http.garbage")
async def garbage(target: Target, draw: random.Random) -> None:
    """Random bytes, TLS, other protocols, and mutated requests."""
    sound = [
        target.request("/generate", {"input_ids": [9], "sampling_params": {"max_new_tokens": 1}}, Connection="close"),
        b"GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n",
    ]
    mutator = Mutator(draw.randrange(1 << 30))
    others = [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + draw.randbytes(500), b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        draw.randbytes(3000), b"\x00" * 70_000, b"GET /\r\n", b"SSH-2.0-x\r\n", b"\r\n" * 10_000,
        b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 50_000 + b"\r\n", b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n", b"A" * 200_000,
    ]  # fmt: skip
    cases = [mutator.raw(draw.choice(sound)) if draw.random() < 0.6 else draw.choice(others) for _ in range(20)]
    await all_of(*(target.exchange(data, half_close=True) for data in cases))


@kind("raw_http.hosts")
async def hosts(target: Target, draw: random.Random) -> None:
    """Host headers of other names on every kind of call: a 4xx on a loopback bind, whatever the key."""
    calls = ["GET /v1/models", "GET /server_info", "GET /version", "POST /abort_request", "POST /load_lora_adapter"]
    for host in draw.sample(HOSTS, 3):
        line = draw.choice(calls)
        for key in ("attacker", "admin"):
            head = f"{line} HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {target.config.keys[key]}\r\n"
            head += "Content-Type: application/json\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}"
            status = status_of(await target.exchange(head.encode()))
            if 200 <= status < 300:
                raise Broken(f"{line} with Host {host} and the key {key}: {status}")


@kind("raw_http.forms")
async def forms(target: Target, draw: random.Random) -> None:
    """Absolute targets, doubled and false lengths, lengths beside chunks, odd methods, and split headers."""
    key = target.config.keys["attacker"]
    body, post = b'{"prompt":"a","max_tokens":1}', b"POST /v1/completions HTTP/1.1\r\n"
    head = f"Host: 127.0.0.1\r\nAuthorization: Bearer {key}\r\nContent-Type: application/json\r\n".encode()
    end = b"Connection: close\r\n\r\n"
    cases: list[tuple[bytes, bool]] = [  # the bytes, and whether only a 4xx or a closed connection is right
        (b"GET http://evil.com/v1/models HTTP/1.1\r\n" + head + end, True),
        (b"GET //evil.com/v1/models HTTP/1.1\r\n" + head + end, True),
        (post + head + b"Content-Length: 29\r\nContent-Length: 5\r\n" + end + body, True),
        (post + head + b"Content-Length: 29\r\nTransfer-Encoding: chunked\r\n" + end
         + b"0\r\n\r\n", True),
        (post + head + b"Content-Length: -1\r\n" + end + body, True),
        (post + head + b"Content-Length: +29\r\n" + end + body, True),
        (post + head + b"Transfer-Encoding: xchunked\r\n" + end + body, True),
        (post + head + b"Transfer-Encoding: chunked\r\n" + end + b"-1\r\n", True),
        (post + head + b"Transfer-Encoding: chunked\r\n" + end
         + b"fffffffffffffffff\r\n", True),
        (b"TRACE / HTTP/1.1\r\n" + head + end, True), (b"CONNECT evil.com:80 HTTP/1.1\r\n" + head + end, True),
        (b"PUT /v1/completions HTTP/1.1\r\n" + head + b"Content-Length: 0\r\n" + end, True),
        (b"GET /health HTTP/1.1\r\n Host: x\r\n" + end, True),
        (b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nHost: evil.com\r\n" + end, True),
        (b"GET /v1/models HTTP/1.1\r\n" + head + b"X-Request-Id: a\r\n\tb\r\n" + end, False),
        (b"OPTIONS * HTTP/1.1\r\n" + head + end, False), (b"HEAD /v1/models HTTP/1.1\r\n" + head + end, False),
        (b"GET /v1/models HTTP/1.0\r\n" + head + b"\r\n", False),
        (post + head + b"Expect: 100-continue\r\nContent-Length: 29\r\n" + end + body, False),
        (post + head + b"Expect: x\r\nContent-Length: 29\r\n" + end + body, False),
    ]  # fmt: skip
    for data, only_refused in draw.sample(cases, 6):
        status = status_of(await target.exchange(data, half_close=True))
        if only_refused and status != CUT and 200 <= status < 300:
            raise Broken(f"{data[:90]!r}...: {status}")


@kind("raw_http.request_ids")
async def request_ids(target: Target, draw: random.Random) -> None:
    """X-Request-Id values that are long or not printable: they are replaced."""
    odd = ["a" * 300, "a" * 3000, "\x1b[2J", "a\tb", "é", "\x7f"]
    sent = draw.choice(odd)
    head = b"GET /version HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nX-Request-Id: " + sent.encode()
    head += b"\r\nAuthorization: Bearer " + target.config.keys["attacker"].encode() + b"\r\n\r\n"
    answer = await target.exchange(head)
    if f"x-request-id: {sent}".encode().lower() in answer.lower():
        raise Broken(f"the request id {sent[:40]!r} was taken")
