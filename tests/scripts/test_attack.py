"""The attack script tells kept promises from broken ones; the attack itself is in tests/e2e/attacks/test_attack.py."""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import attack  # puts what the attacks import on sys.path, and registers the kinds
import pytest
from aiohttp import ClientSession, web
from aiohttp.test_utils import TestServer
from attacks.kind import KINDS, Broken, Kind, choose
from attacks.report import Phase, Report
from attacks.rounds import Orders, Round, in_turn
from attacks.run import plan
from attacks.server import KEYS, write_keys
from attacks.target import CUT, Config, Target, status_of
from attacks.victim import TOKENS, Victim, Watch, make_requests

from engine.config.api_keys import read_keys

RIGHT = list(range(TOKENS))


def config(url: str = "http://127.0.0.1:1", faults: bool = False) -> Config:
    host, _, port = url.removeprefix("http://").rstrip("/").partition(":")
    keys = {"attacker": "a"}
    return Config(
        host=host, port=int(port), pid=1, zmq_address="ipc:///tmp/x/y", scratch="/tmp", demo="/tmp", keys=keys,
        faults=faults,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- verdicts


def phase(name: str, gap: float = 0.01, memory: int = 100, **fields: object) -> Phase:
    found = Phase(name, Watch(gaps=[(float(n), gap) for n in range(100)], answered=3), [(0.0, memory)])
    for field, value in fields.items():
        setattr(found, field, value)
    return found


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, None),
        ({"gap": 0.029}, None),
        ({"gap": 0.031}, "gaps: p99 3.10 of the calm"),
        ({"memory": 129}, None),
        ({"memory": 131}, "memory: 1.31 of the calm"),
        ({"restarts": 1}, "1 processes were replaced"),
        ({"watch": Watch()}, "no stream was finished"),
        ({"watch": Watch(answered=3, differences=["a", "a"])}, "the victim: a (2 times)"),
        ({"rounds": [Round(kind="k", began=1.0, ended=2.0, broken="b")]}, "k: b"),
    ],
)
def test_each_broken_promise_is_told(changes: dict[str, object], says: str | None) -> None:
    broken = Report([phase("calm"), phase("attack", **changes)]).broken()  # type: ignore[arg-type]
    assert broken == [] if says is None else says in broken[0]


def test_faults_excuse_gaps_and_restarts_but_no_token() -> None:
    assert Report([phase("calm"), phase("faults", gap=9.0, restarts=4)]).broken() == []
    wrong = phase("faults", watch=Watch(answered=3, differences=["a"]))
    assert Report([phase("calm"), wrong]).broken() == ["faults: the victim: a"]
    assert Report([phase("calm"), phase("faults", memory=200)]).broken()


def test_a_gap_counts_for_the_kinds_that_ran_during_it() -> None:
    one = phase("attack", watch=Watch(gaps=[(10.0, 2.0)]))
    one.rounds = [Round(kind="during", began=9.0, ended=12.0), Round(kind="after", began=10.5, ended=12.0)]
    assert {name: result.worst_gap for name, result in one.kinds().items()} == {"during": 2.0, "after": 0.0}
    assert json.dumps(Report([phase("calm"), one]).json())
    assert "during" in Report([phase("calm"), one]).show()


# ------------------------------------------------------------------------------------------------------ what is run


def test_kinds_are_chosen_by_name_and_group() -> None:
    assert {each.is_fault for each in choose(None, None)} == {False}
    assert {each.name for each in choose("rates.burst,bodies", "faults.strikes")} == {
        "rates.burst", "faults.strikes", *(name for name in KINDS if name.startswith("bodies."))
    }  # fmt: skip
    assert len(choose(None, "faults")) == len(KINDS)
    with pytest.raises(ValueError, match="no kind of attack is called rate"):
        choose("rate", None)


def test_every_kind_says_what_it_does() -> None:
    assert len(KINDS) > 45
    assert [name for name, each in KINDS.items() if not each.summary] == []


def test_calm_comes_first_and_faults_come_last() -> None:
    found = list(plan(choose("rates", "faults.strikes"), 300))
    assert [(phase.name, seconds) for phase, _, seconds in found] == [
        ("calm", 60.0),
        ("attack", 120.0),
        ("faults", 120.0),
    ]
    assert found[1][1] == [name for name in KINDS if name.startswith("rates.")]
    assert found[2][1] == [*found[1][1], "faults.strikes"]
    assert [phase.name for phase, _, _ in plan(choose("rates", None), 10)] == ["calm", "attack"]
    assert [phase.name for phase, _, _ in plan(choose("faults", None), 10)] == ["calm", "faults"]


def test_every_kind_has_its_turn_before_one_comes_again() -> None:
    orders = Orders(config=config(), kinds=list(KINDS), seed=3, seconds=1, at_once=1, nice=0)

    def names(turns: Iterator[tuple[int, Kind]]) -> list[str]:
        return [next(turns)[1].name for _ in KINDS]

    turns = in_turn(orders)
    first, second = names(turns), names(turns)
    assert sorted(first) == sorted(second) == sorted(KINDS)
    assert first != second
    assert first == names(in_turn(orders))


def test_keys_of_the_attacked_server_are_valid(tmp_path: Path) -> None:
    keys = write_keys(tmp_path / "keys")
    found = read_keys([], str(tmp_path / "keys"), {})
    assert [one.tenant for one in found] == list(KEYS)
    assert {one.key for one in found} < set(keys.values())


# --------------------------------------------------------------------------------------------------------- the victim


async def watched(tokens: list[int], status: int = 200, *, cut: bool = False, may_lose: bool = False) -> Watch:
    """Returns what the victim sees of a server that first streams RIGHT, and then these tokens."""
    learnt = False

    async def generate(request: web.Request) -> web.StreamResponse:
        if learnt and status != 200:
            return web.json_response({"error": {"message": "no"}}, status=status)
        response = web.StreamResponse()
        await response.prepare(request)
        for end in range(1, len(tokens if learnt else RIGHT) + 1):
            event = json.dumps({"output_ids": (tokens if learnt else RIGHT)[:end]})
            await response.write(f"data: {event}\n\n".encode())
        if not (learnt and cut):
            await response.write(b"data: [DONE]\n\n")
        return response

    app = web.Application()
    app.router.add_post("/generate", generate)
    async with TestServer(app) as server:
        victim = Victim(str(server.make_url("/")), "key", make_requests(random.Random(1)))
        await victim.learn()
        learnt, victim.may_lose, watch = True, may_lose, Watch()
        await victim.run(time.monotonic() + 0.05, watch)
    return watch


def test_equal_streams_are_no_difference() -> None:
    watch = asyncio.run(watched(RIGHT))
    assert watch.answered > 0
    assert watch.differences == []
    assert len(watch.gaps) == watch.answered * (TOKENS - 1)


@pytest.mark.parametrize("tokens", [[*RIGHT[:-1], 7], RIGHT[:-1], [], [*RIGHT, 1]])
def test_other_tokens_are_a_difference(tokens: list[int]) -> None:
    assert asyncio.run(watched(tokens)).differences
    assert asyncio.run(watched(tokens, may_lose=True)).differences


def test_lost_streams_are_excused_beside_faults_only() -> None:
    assert asyncio.run(watched(RIGHT[:5], cut=True)).differences
    lost = asyncio.run(watched(RIGHT[:5], cut=True, may_lose=True))
    assert lost.differences == []
    assert lost.cut > 0
    assert asyncio.run(watched([1, *RIGHT[:5]], cut=True, may_lose=True)).differences


@pytest.mark.parametrize(
    ("status", "may_lose", "is_right"), [(503, True, True), (503, False, False), (500, True, False)]
)
def test_refused_streams_are_excused_beside_faults_only(status: int, may_lose: bool, is_right: bool) -> None:
    watch = asyncio.run(watched(RIGHT, status, may_lose=may_lose))
    assert watch.refused > 0
    assert (watch.differences == []) == is_right


# -------------------------------------------------------------------------------------------------------- the answers


async def call(status: int, body: str, faults: bool = False, **expect: object) -> str:
    """Returns what a call finds broken, or the counted status."""

    async def answer(request: web.Request) -> web.Response:
        return web.Response(status=status, text=body, headers={"Retry-After": "1"} if "late" in body else {})

    app = web.Application()
    app.router.add_post("/x", answer)
    async with TestServer(app) as server, ClientSession() as session:
        target = Target(config(str(server.make_url("/")), faults), session)
        try:
            await target.call("/x", {}, **expect)  # type: ignore[arg-type]
        except Broken as error:
            return str(error)
        return next(iter(target.statuses))


@pytest.mark.parametrize(
    ("status", "body", "expect", "finds"),
    [
        (200, "", {}, "2xx"), (429, "", {}, "429"), (503, '{"error": "late"}', {}, "503"), (504, "", {}, "5xx"),
        (500, "", {}, ": 500"), (502, "", {}, ": 502"), (503, '{"error": "x"}', {}, "without Retry-After"),
        (200, "", {"expect": (400,)}, ": 200"), (400, "", {"expect": (400,)}, "4xx"),
    ],
)  # fmt: skip
def test_unpromised_answers_are_broken(status: int, body: str, expect: dict[str, object], finds: str) -> None:
    assert finds in asyncio.run(call(status, body, **expect))


def test_a_poisoned_request_is_right_beside_faults_only() -> None:
    poisoned = '{"error": {"code": "poison_request"}}'
    assert asyncio.run(call(500, poisoned, faults=True)) == "5xx"
    assert ": 500" in asyncio.run(call(500, poisoned))
    assert ": 500" in asyncio.run(call(500, "", faults=True))


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\n", 200),
        (b"HTTP/1.0 404 Not Found\r\n", 404),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 503 Busy\r\n\r\n", 503),
        (b"HTTP/1.1 102 Processing\r\n\r\n", CUT),
        (b"", CUT),
        (b"HTTP/1.1 ", CUT),
        (b"SSH-2.0", CUT),
    ],
)
def test_the_status_of_raw_answers_is_the_final_one(answer: bytes, status: int) -> None:
    assert status_of(answer) == status


def test_a_call_without_an_answer_is_broken() -> None:
    async def find() -> str:
        async with ClientSession() as session:
            with pytest.raises(Broken) as caught:
                await Target(config(), session).call("/x")
            return str(caught.value)

    assert "Connect" in asyncio.run(find())


def test_the_script_lists_its_kinds(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["attack.py", "--list"])
    assert attack.main() == 0
    assert len(capsys.readouterr().out.splitlines()) == len(KINDS)
