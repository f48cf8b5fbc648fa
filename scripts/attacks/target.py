"""What an attacker has: addresses, keys, a directory to write adapters in, and calls whose answers are checked.

Attackers connect from 127.0.0.2, so that limits by address do not count them together with the victim.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections import Counter
from collections.abc import AsyncIterator, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
from yarl import URL

from attacks.kind import Broken

SECONDS = 90.0
"""How long an answer may take before the server counts as hung; attackers run at the lowest priority."""

SOURCE = "127.0.0.2"
CUT = -1
"""The status of a call whose connection was closed without an answer."""


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """What the parent process tells the attackers."""

    host: str
    port: int
    pid: int
    zmq_address: str
    scratch: str
    demo: str
    keys: dict[str, str]
    faults: bool


@dataclass
class Answer:
    """The answer of one call. `status` is CUT if the connection was closed without one."""

    status: int
    body: bytes
    headers: Mapping[str, str]

    @property
    def text(self) -> str:
        """The body as text."""
        return self.body.decode("utf-8", "replace")

    def json(self) -> Any:
        """Returns the decoded body."""
        return json.loads(self.body)


@dataclass
class Target:
    """The server under attack, as one round of one kind sees it. `statuses` counts the answers of the round."""

    config: Config
    session: aiohttp.ClientSession
    statuses: Counter[str] = field(default_factory=Counter)

    @property
    def scratch(self) -> Path:
        """A directory under --lora-root."""
        return Path(self.config.scratch)

    @property
    def demo(self) -> Path:
        """The directory of the demo's model and adapters."""
        return Path(self.config.demo)

    @property
    def run_directory(self) -> Path:
        """The directory of the processes' sockets."""
        return Path(self.config.zmq_address.removeprefix("ipc://")).parent

    def url(self, path: str) -> URL:
        """Returns the address of a path, which is sent as it is spelled."""
        return URL(f"http://{self.config.host}:{self.config.port}{path}", encoded=True)

    def headers(self, key: str | None) -> dict[str, str]:
        """Returns the header that sends the key of this name."""
        return {} if key is None else {"Authorization": f"Bearer {self.config.keys[key]}"}

    # ---------------------------------------------------------------------------------------------------- calls

    async def call(
        self,
        path: str,
        body: Any = None,
        *,
        key: str | None = "attacker",
        method: str = "POST",
        headers: Mapping[str, str] | None = None,
        seconds: float = SECONDS,
        expect: Collection[int] | None = None,
        may_cut: bool = False,
    ) -> Answer:
        """Makes one call and checks its status.

        `body` is JSON, or bytes that are sent as they are. Without `expect` every status below 500 is right, and 503
        and 504. `may_cut` allows the server to close the connection, as it may while it refuses a long body.
        """
        data = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
        sent = {"Content-Type": "application/json"} | self.headers(key) | dict(headers or {})
        what = f"{method} {path[:80]} {(data or b'')[:120]!r}"
        try:
            async with asyncio.timeout(seconds):
                async with self.session.request(method, self.url(path), data=data, headers=sent) as response:
                    answer = Answer(response.status, await response.read(), response.headers)
        except TimeoutError as error:
            self.statuses["hang"] += 1
            raise Broken(f"{what}: no answer in {seconds:.0f} s") from error
        except (aiohttp.ClientError, OSError, ValueError) as error:
            self.statuses["cut"] += 1
            if not (may_cut or self.config.faults):
                raise Broken(f"{what}: {type(error).__name__}: {error}") from error
            return Answer(CUT, b"", {})
        self.check(what, answer, expect)
        return answer

    async def tokens(self, adapter: str, body: Mapping[str, Any]) -> list[int] | None:
        """Returns the tokens that an adapter answers to a body of /generate.

        None: the answer is a 503, or was aborted, as another attack aborts all requests of the same key.
        """
        answer = await self.call("/generate", {**body, "lora_path": adapter}, expect=(200, 503))
        if answer.status != 200:
            return None
        found = answer.json()
        tokens: list[int] = found["output_ids"]
        return None if found["meta_info"]["finish_reason"]["type"] == "abort" else tokens

    def check(self, what: str, answer: Answer, expect: Collection[int] | None = None) -> None:
        """Counts the answer. Raises Broken for a status that is not expected, and for an error without a message."""
        self.statuses[status_class(answer.status)] += 1
        is_right = answer.status < 500 or answer.status in (503, 504)
        if expect is not None:
            is_right = answer.status in expect or (self.config.faults and answer.status == 503)
        if self.config.faults and answer.status == 500:
            is_right = b"poison_request" in answer.body
        if not is_right:
            raise Broken(f"{what}: {answer.status} {answer.text[:300]}")
        if answer.status == 503 and b"Retry-After" not in str(answer.headers).encode() and b'"error"' in answer.body:
            raise Broken(f"{what}: a 503 without Retry-After: {answer.text[:200]}")

    async def leave(self, path: str, body: Any, after: float, key: str = "attacker") -> None:
        """Makes a call, and leaves after `after` seconds if it has no answer by then."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        head = {"Content-Type": "application/json"} | self.headers(key)
        with contextlib.suppress(TimeoutError, aiohttp.ClientError, OSError):
            async with asyncio.timeout(after), self.session.post(self.url(path), data=data, headers=head) as response:
                self.statuses[status_class(response.status)] += 1
                await response.read()
                return
        self.statuses["left"] += 1

    # ---------------------------------------------------------------------------------------------------- raw bytes

    @contextlib.asynccontextmanager
    async def connect(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        """Opens a connection to the HTTP port; at the end it is closed without waiting."""
        try:
            reader, writer = await asyncio.open_connection(
                self.config.host, self.config.port, local_addr=(SOURCE, 0), limit=1 << 22
            )
        except OSError as error:
            self.statuses["refused"] += 1
            raise ConnectionError(str(error)) from error
        try:
            yield reader, writer
        finally:
            writer.transport.abort()

    async def exchange(self, data: bytes, *, half_close: bool = False, seconds: float = SECONDS) -> bytes:
        """Sends bytes on a new connection, and returns what comes back until the server closes it.

        The request must ask for `Connection: close`. An empty answer is a closed connection.
        """
        try:
            async with asyncio.timeout(seconds), self.connect() as (reader, writer):
                writer.write(data)
                if half_close:
                    writer.write_eof()
                answer = await reader.read(-1)
        except TimeoutError as error:
            self.statuses["hang"] += 1
            raise Broken(f"{data[:120]!r}: the connection is still open after {seconds:.0f} s") from error
        except OSError:
            answer = b""
        status = status_of(answer)
        self.statuses[status_class(status)] += 1
        if status >= 500 and status not in (503, 504):
            raise Broken(f"{data[:120]!r}: {answer[:300]!r}")
        return answer

    def socket(self, receive_buffer: int | None = None) -> socket.socket:
        """Returns a connected blocking socket, with a small receive buffer for clients that do not read."""
        client = socket.socket()
        if receive_buffer is not None:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        client.bind((SOURCE, 0))
        client.settimeout(10.0)
        client.connect((self.config.host, self.config.port))
        return client

    def request(self, path: str, body: Any, key: str = "attacker", **headers: str) -> bytes:
        """Returns the bytes of a POST."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        fields = {"Host": f"{self.config.host}:{self.config.port}", "Content-Type": "application/json"}
        fields |= self.headers(key) | {"Content-Length": str(len(data))} | headers
        head = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in fields.items())
        return f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + data


def status_of(answer: bytes) -> int:
    """Returns the status of raw HTTP bytes, or CUT. Interim answers, which come before the final one, are skipped."""
    while answer.startswith(b"HTTP/1.1 1"):
        answer = answer.partition(b"\r\n\r\n")[2]
    words = answer[:20].split(b" ", 2)
    return int(words[1]) if answer.startswith(b"HTTP/1.") and words[1].isdigit() else CUT


def status_class(status: int) -> str:
    """Returns the name under which a status is counted: 2xx, 4xx, 429, 503, 5xx, cut."""
    if status == CUT:
        return "cut"
    if status in (429, 503):
        return str(status)
    return f"{status // 100}xx"


async def all_of(*work: Any) -> list[Any]:
    """Runs coroutines together to their ends, then raises the first exception, if any. Returns their results."""
    results = await asyncio.gather(*work, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results
