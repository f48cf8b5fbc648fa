"""Bodies while they arrive: their memory together, each caller's share of it, their speed, and what is left unread."""

from __future__ import annotations

import asyncio
import gzip
import json
import traceback
import zlib
from collections import Counter
from typing import Any

import pytest
from fixtures.connections.raw_http import Caller, Served, call, head, served, until
from fixtures.serving.fake_frontend import FakeFrontend

from engine.config.api_keys import ApiKey
from engine.errors import EngineError
from tokenizer_proc.http import server
from tokenizer_proc.http.intake import body_reader
from tokenizer_proc.http.intake.body_reader import PIECE
from tokenizer_proc.http.intake.memory_budget import MemoryBudget
from tokenizer_proc.http.intake.shape import ShapeScan
from tokenizer_proc.http.middleware import errors

MIB = 1 << 20
GZIP = "Content-Encoding: gzip"


@pytest.fixture(autouse=True)
def short_lingering(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "LINGERING_SECONDS", 0.3)


@pytest.fixture
def budgets(monkeypatch: pytest.MonkeyPatch) -> list[MemoryBudget]:
    """The budgets of the servers that are started, with the largest use of each as `peak`."""
    made: list[MemoryBudget] = []

    class Watched(MemoryBudget):
        peak = 0

        def __init__(self, total: int) -> None:
            super().__init__(total)
            made.append(self)

        def take(self, owner: str, count: int) -> None:
            super().take(owner, count)
            self.peak = max(self.peak, self.used)

    monkeypatch.setattr("tokenizer_proc.http.app.MemoryBudget", Watched)
    return made


async def unfinished(app: Served, count: int, data: bytes, *lines: str, source: str = "127.0.0.1") -> list[Caller]:
    """Returns connections that have sent a head and `data`, which is not the whole body."""
    callers = [await app.connect(source) for _ in range(count)]
    for caller in callers:
        caller.writer.write(head("/generate", None, *lines) + f"{len(data):x}\r\n".encode() + data + b"\r\n")
    return callers


def test_unfinished_bodies_share_one_budget(budgets: list[Any]) -> None:
    async def main() -> None:
        async with served(FakeFrontend(), max_request_memory=6 * MIB, read_timeout=60) as app:
            text = b'{"text":"' + b"a" * MIB
            callers = await unfinished(app, 20, text)
            bombs = await unfinished(app, 10, gzip.compress(text), GZIP)
            answers = [asyncio.ensure_future(caller.answer()) for caller in callers + bombs]
            await until(lambda: sum(one.done() for one in answers) >= 26)
            refused = [one.result() for one in answers if one.done()]
            assert {one.status for one in refused} == {503}
            assert {one.headers["retry-after"] for one in refused} == {"1"}
            assert "--max-request-memory" in refused[0].message
            assert budgets[0].peak <= budgets[0].most == 4 * MIB
            for one in answers:
                one.cancel()
            await asyncio.gather(*answers, return_exceptions=True)
            for caller in callers + bombs:
                await caller.close()
            await until(lambda: budgets[0].used == 0)
            late = await app.connect()
            await late.send(call("/generate", {"text": "a"}))
            assert (await late.answer()).status == 200
        assert budgets[0].used == 0

    asyncio.run(main())


def test_a_caller_leaves_room_for_others(budgets: list[Any]) -> None:
    async def main() -> None:
        keys = [ApiKey(key="k-hog", tenant="hog"), ApiKey(key="k-other", tenant="other")]
        async with served(FakeFrontend(), max_request_memory=9 * MIB, read_timeout=60, api_keys=keys) as app:
            text = b'{"text":"' + b"a" * MIB
            hogs = await unfinished(app, 12, text, "Authorization: Bearer k-hog")
            answers = [asyncio.ensure_future(caller.answer()) for caller in hogs]
            await until(lambda: sum(one.done() for one in answers) >= 6)
            held = budgets[0].held_by("tenant hog")
            assert 4 * MIB < held <= budgets[0].most == 6 * MIB
            other = await app.connect()
            await other.send(call("/generate", {"input_ids": [1] * 20_000}, "Authorization: Bearer k-other"))
            assert (await other.answer()).status == 400  # the context of the model is shorter; the body was taken
            without = await app.connect()
            await without.send(head("/generate") + b"100000\r\n" + b" " * (1 << 16))
            assert (await without.answer()).status == 401
            assert [*budgets[0]._by_owner] == ["tenant hog"]
            for one in answers:
                one.cancel()
            await asyncio.gather(*answers, return_exceptions=True)

    asyncio.run(main())


def test_addresses_without_keys_are_callers() -> None:
    async def main() -> None:
        async with served(FakeFrontend(), max_request_memory=9 * MIB, read_timeout=60) as app:
            hogs = await unfinished(app, 12, b'{"text":"' + b"a" * MIB, source="127.0.0.2")
            answers = [asyncio.ensure_future(caller.answer()) for caller in hogs]
            await until(lambda: sum(one.done() for one in answers) >= 6)
            other = await app.connect()
            await other.send(call("/generate", {"text": "a", "rid": "b" * 500_000}))
            assert (await other.answer()).status == 200
            for one in answers:
                one.cancel()
            await asyncio.gather(*answers, return_exceptions=True)

    asyncio.run(main())


def test_a_body_that_could_never_fit_is_a_413() -> None:
    async def main() -> None:
        async with served(FakeFrontend(), max_request_memory=3 * MIB) as app:
            for body, says in (
                (b'{"text":"' + b"a" * (3 * MIB) + b'"}', "2 MiB"),
                (b'{"input_ids":[' + b"1," * 60_000 + b"1]}", "2 MiB"),
                (b'{"text":"' + b"a" * (33 * MIB), "33554432 bytes"),
            ):
                client = await app.connect()
                client.writer.write(head("/generate", len(body)) + body)
                answer = await client.answer()
                assert answer.status == 413
                assert says in answer.message
                assert json.loads(answer.body)["error"]["code"] == "request_too_large"

    asyncio.run(main())


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_a_small_bomb_is_refused_at_its_first_pieces(encoding: str, budgets: list[Any]) -> None:
    bomb = b'{"input_ids":[' + b"[]," * (10 << 20) + b"[]]}"
    data = gzip.compress(bomb) if encoding == "gzip" else zlib.compress(bomb)

    async def main() -> None:
        async with served(FakeFrontend()) as app:
            client = await app.connect()
            await client.send(head("/generate", len(data), f"Content-Encoding: {encoding}") + data)
            answer = await client.answer()
            assert answer.status == 400
            assert json.loads(answer.body)["error"]["param"] == "input_ids"
            assert budgets[0].peak < 5 * PIECE
            assert await client.rest() == b""

    asyncio.run(main())


def test_each_turn_of_the_loop_works_on_one_large_body(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many large bodies arrive, compressed or not, other calls wait for one step of the work on them."""
    steps: list[int] = []
    turns = [0]

    class Counted(ShapeScan):
        def feed(self, body: bytearray | bytes) -> None:
            steps.append(turns[0])
            super().feed(body)

    monkeypatch.setattr(body_reader, "ShapeScan", Counted)

    async def main() -> None:
        async def count() -> None:
            while True:
                turns[0] += 1
                await asyncio.sleep(0)

        counting = asyncio.ensure_future(count())
        async with served(FakeFrontend(), max_request_memory=256 * MIB) as app:
            data = gzip.compress(b'{"text":"a","rid":"' + b"a" * (2 * MIB) + b'"}')
            clients = [await app.connect() for _ in range(6)]
            for client in clients:
                await client.send(head("/generate", len(data), GZIP) + data)
            assert {(await client.answer()).status for client in clients} == {200}
        counting.cancel()

    asyncio.run(main())
    assert len(steps) >= 6 * 32
    assert max(Counter(steps).values()) <= 2


def test_a_body_that_trickles_is_a_408(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body_reader, "LEAST_RATE", 1 << 20)

    async def main() -> None:
        async with served(FakeFrontend(), read_timeout=0.3) as app:
            slow = await app.connect()
            await slow.send(head("/generate", 1000) + b'{"text":')

            async def trickle() -> None:
                while True:
                    await slow.send(b" ")
                    await asyncio.sleep(0.01)

            sending = asyncio.ensure_future(trickle())
            answer = await slow.answer()
            sending.cancel()
            assert (answer.status, answer.headers["connection"]) == (408, "close")
            assert "--read-timeout" in answer.message

    asyncio.run(main())


def test_a_body_that_goes_on_arriving_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body_reader, "LEAST_RATE", 1000)

    async def main() -> None:
        async with served(FakeFrontend(), read_timeout=0.2) as app:
            data = json.dumps({"text": "a", "rid": "b" * 2000}).encode()
            slow = await app.connect()
            await slow.send(head("/generate", len(data)))
            for at in range(0, len(data), 500):
                await slow.send(data[at : at + 500])
                await asyncio.sleep(0.1)
            assert (await slow.answer()).status == 200

    asyncio.run(main())


@pytest.mark.parametrize("lines", [(), (GZIP,)])
def test_what_follows_a_refusal_is_dropped(lines: tuple[str, ...], budgets: list[Any]) -> None:
    """A body is not read, and not inflated, after its refusal; the client may still send it, and gets the answer."""

    async def main() -> None:
        async with served(FakeFrontend(), api_keys=[ApiKey(key="k")]) as app:
            data = b'{"text":"' + b"a" * (4 * MIB) + b'"}'
            data = gzip.compress(data, 1) if lines else data
            client = await app.connect()
            await client.send(head("/generate", len(data), *lines) + data)
            answer = await client.answer()
            assert (answer.status, answer.headers["connection"]) == (401, "close")
            assert budgets[0].peak == 0
            assert await client.rest() == b""

    asyncio.run(main())


@pytest.mark.parametrize("ending", [b'"}', b'"', b"", b'","x":' + b"[" * 99])
def test_no_body_stays_with_the_error_that_refuses_it(ending: bytes, budgets: list[Any]) -> None:
    """The answer keeps its error until the rest of the body was dropped, but not the body."""
    refused: list[EngineError] = []

    async def main() -> None:
        async with served(FakeFrontend(), max_request_memory=3 * MIB) as app:
            client = await app.connect()
            data = b'{"rid":["' + b"a" * MIB + b"b" * (MIB * (ending == b"")) + ending
            await client.send(head("/generate", len(data)) + data)
            assert (await client.answer()).status in (400, 413)

    with pytest.MonkeyPatch.context() as patch:
        made = errors.response
        patch.setattr(errors, "response", lambda error, **more: refused.append(error) or made(error, **more))
        asyncio.run(main())
    frames = [frame.f_locals for frame, _ in traceback.walk_tb(refused[0].__traceback__)]
    held = [value for frame in frames for value in frame.values() if isinstance(value, bytes | bytearray)]
    assert all(len(value) < MIB for value in held)
    assert refused[0].__cause__ is None


def test_the_memory_of_a_request_is_held_until_it_is_answered(budgets: list[Any]) -> None:
    async def main() -> None:
        front = FakeFrontend()
        front.hold_after = 1
        async with served(front) as app:
            client = await app.connect()
            await client.send(call("/generate", {"text": "a", "rid": "r" * 100_000}))
            await until(lambda: front.submits)
            assert 100_000 <= budgets[0].used < 250_000
            await client.close()
            await until(lambda: budgets[0].used == 0)

    asyncio.run(main())
