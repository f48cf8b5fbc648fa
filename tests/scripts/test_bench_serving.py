"""The benchmark client against a small fake server, and its statistics against numbers known beforehand."""

from __future__ import annotations

import asyncio
import json
import math
import random
import statistics
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import bench_serving
import numpy as np
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from bench.client import Sample, Server, open_session
from bench.loops import Run, closed_loop, open_loop
from bench.report import by_adapter, percentile, plain, ratios, summarise, table
from bench.workload import Lengths, Plan, Request, chooser, gap
from hypothesis import given
from hypothesis import strategies as st

PLAN = Plan(40, Lengths(3, 9), Lengths(2, 5), (100, 200), ("a", "b", "c"), "round-robin", 1.0, None, 1.0)


class FakeServer:
    """Streams the requested tokens, two to a chunk after the first; adapters named `bad-*` cause errors."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.in_flight = self.most_in_flight = 0

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/v1/models", self.models)
        app.router.add_post("/v1/completions", self.complete)
        return app

    async def models(self, request: web.Request) -> web.Response:
        cards = [{"id": "base", "parent": None}, {"id": "a", "parent": "base"}, {"id": "b", "parent": "base"}]
        return web.json_response({"object": "list", "data": cards})

    async def complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            return await self.stream(request, body)
        finally:
            self.in_flight -= 1

    async def stream(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        if body["model"] == "bad-name":
            return web.json_response({"error": {"message": "no", "type": "x", "code": "model_not_found"}}, status=404)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)

        async def send(event: dict[str, Any]) -> None:
            await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")

        left = body["max_tokens"]
        for tokens in [1] + [2] * left:
            if left <= 0:
                break
            left -= tokens
            finish = "length" if left <= 0 else None
            await send({"choices": [{"text": "x" * tokens, "finish_reason": finish}], "usage": None})
            await asyncio.sleep(0)
            if body["model"] == "bad-stream":
                await send({"error": {"message": "broke"}})
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": body["max_tokens"]}
        await send({"choices": [], "usage": usage})
        if body["model"] != "bad-end":
            await response.write(b"data: [DONE]\n\n")
        return response


def with_fake(use: Callable[[Server, FakeServer], Awaitable[Any]], timeout: float = 30.0) -> Any:
    async def go() -> Any:
        fake = FakeServer()
        async with TestServer(fake.app()) as http, open_session("key", timeout) as session:
            return await use(Server(session, str(http.make_url("/")), "base"), fake)

    return asyncio.run(go())


def sample(pieces: list[float], tokens: int, **more: Any) -> Sample:
    return Sample(
        more.pop("adapter", None), more.pop("wanted", tokens), pieces, tokens, 4, pieces[-1] if pieces else 0, **more
    )


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30), st.floats(0, 100))
def test_percentiles_equal_numpys(values: list[float], q: float) -> None:
    assert percentile(values, q) == pytest.approx(np.percentile(values, q), abs=1e-6)


def test_summary_has_the_times_of_its_samples() -> None:
    # first tokens after 0.1 and 0.3 s; gaps 0.02, 0.04 and 0.06 s; five tokens in three chunks, two in two
    runs = [Run([sample([0.1, 0.12, 0.16], 5)], 1.0), Run([sample([0.3, 0.36], 2)], 3.0)]
    summary = summarise(runs)
    assert summary.times_ms["TTFT"]["p50"] == pytest.approx(200)
    assert summary.times_ms["ITL"]["p50"] == pytest.approx(40)
    assert summary.times_ms["ITL"]["p90"] == pytest.approx(56)
    assert summary.times_ms["TPOT"]["p50"] == pytest.approx((15 + 60) / 2)
    assert summary.times_ms["E2E"]["mean"] == pytest.approx(260)
    assert (summary.output_tokens, summary.input_tokens, summary.short) == (7, 8, 0)
    assert summary.output_tokens_per_s == pytest.approx(7 / 4)
    assert summary.requests_per_s == pytest.approx(2 / 4)
    assert "TTFT       200.00" in table(summary)


def test_failed_requests_have_no_times() -> None:
    failed = sample([], 0, wanted=4, error="timeout")
    summary = summarise([Run([failed, failed, sample([0.1], 1, wanted=4)], 1.0)])
    assert (summary.requests, summary.answered, summary.short) == (3, 1, 1)
    assert summary.errors == {"timeout": 2}
    assert summary.times_ms["E2E"]["p99"] == pytest.approx(100)
    assert math.isnan(summary.times_ms["ITL"]["p50"])
    assert json.loads(json.dumps(plain(summary), allow_nan=False))["times_ms"]["ITL"]["p50"] is None
    assert "error: timeout x 2" in table(summary)


def test_ratios_are_taken_by_round() -> None:
    def run(tokens: int) -> Run:
        return Run([sample([0.1, 0.2], tokens)], 1.0)

    row = ratios([run(10), run(10), run(20)], [run(20), run(5), run(20)])["output tokens/s"]
    assert row == {"median": 1.0, "lowest": 0.5, "highest": 2.0}


def test_by_adapter_splits_all_samples() -> None:
    run = Run([sample([0.1], 1, adapter="a"), sample([0.2], 3, adapter="a"), sample([0.3], 5)], 2.0)
    parts = by_adapter([run])
    assert {name: (s.requests, s.output_tokens_per_s) for name, s in parts.items()} == {
        "a": (2, 2.0),
        "(base)": (1, 2.5),
    }


def test_workload_depends_on_the_seed_only() -> None:
    requests = PLAN.requests(1)
    assert requests == PLAN.requests(1)
    assert requests != PLAN.requests(2)
    assert {len(request.prompt) for request in requests} == set(range(3, 10))
    assert {request.output_len for request in requests} == set(range(2, 6))
    assert all(100 <= token <= 200 for request in requests for token in request.prompt)
    assert [request.adapter for request in requests[:4]] == ["a", "b", "c", "a"]


def test_power_law_prefers_the_first_adapter() -> None:
    choose = chooser("power-law", ["a", "b", "c"], 1.0, random.Random(0))
    counts = Counter(choose(i) for i in range(11000))
    assert [counts[name] / 1000 for name in "abc"] == pytest.approx([6, 3, 2], rel=0.1)
    assert chooser("none", [], 1.0, random.Random(0))(5) is None
    assert chooser("single", ["a", "b"], 1.0, random.Random(0))(5) == "a"
    with pytest.raises(ValueError, match="needs adapters"):
        chooser("single", [], 1.0, random.Random(0))


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_have_the_given_rate_and_burstiness(burstiness: float) -> None:
    rng = random.Random(3)
    gaps = [gap(20.0, burstiness, rng) for _ in range(40000)]
    mean = statistics.fmean(gaps)
    assert mean == pytest.approx(1 / 20, rel=0.05)
    assert statistics.pstdev(gaps) / mean == pytest.approx(burstiness**-0.5, rel=0.05)


def test_bad_lengths_are_refused_with_a_reason() -> None:
    assert Lengths.parse("7") == Lengths(7, 7)
    assert Lengths.parse("2:9") == Lengths(2, 9)
    for text in ("0", "9:2", "x", "-3"):
        with pytest.raises(ValueError, match=r"."):
            Lengths.parse(text)


def test_stream_is_counted_by_usage_and_chunks() -> None:
    async def use(server: Server, fake: FakeServer) -> Run:
        return await closed_loop(server, [Request([5, 6, 7], 6, "a", 0.0)], 1, "test")

    (one,) = with_fake(use).samples
    assert one.error is None
    assert (one.tokens, one.input_tokens, len(one.pieces)) == (6, 3, 4)  # 1 + 2 + 2 + 1
    assert one.pieces == sorted(one.pieces)
    assert one.latency == one.pieces[-1]


def test_errors_are_counted_by_kind() -> None:
    async def use(server: Server, fake: FakeServer) -> Run:
        names = ["bad-name", "bad-stream", "bad-end", "bad-name", None]
        return await closed_loop(server, [Request([5], 3, name, 0.0) for name in names], 2, "test")

    summary = summarise([with_fake(use)])
    assert summary.errors == {"HTTP 404 model_not_found": 2, "error in stream": 1, "stream cut short": 1}
    assert summary.answered == 1


def test_unreachable_server_fails_every_request() -> None:
    async def go() -> Run:
        async with open_session(None, 5.0) as session:
            return await closed_loop(Server(session, "http://127.0.0.1:9"), [Request([5], 3, None, 0.0)] * 3, 2, "test")

    assert summarise([asyncio.run(go())]).errors == {"ClientConnectorError": 3}


def test_closed_loop_keeps_its_concurrency() -> None:
    async def use(server: Server, fake: FakeServer) -> tuple[Run, FakeServer]:
        return await closed_loop(server, PLAN.requests(0), 4, "test"), fake

    run, fake = with_fake(use)
    assert len(run.samples) == 40
    assert fake.most_in_flight <= 4
    assert Counter(body["model"] for body in fake.bodies) == {"a": 14, "b": 13, "c": 13}
    assert all(body["ignore_eos"] and body["stream"] and body["temperature"] == 0 for body in fake.bodies)


def test_open_loop_does_not_wait_for_answers() -> None:
    """The server responds only after the last request has arrived: a loop that waited for responses would never end."""
    arrived, everybody = [], asyncio.Event()

    class Stuck:
        async def send(self, request: Request, due: float) -> Sample:
            arrived.append((request, due))
            if len(arrived) == len(requests):
                everybody.set()
            await everybody.wait()
            return Sample(request.adapter, request.output_len)

    requests = [Request([1], 1, None, i * 0.001) for i in range(20)]
    run = asyncio.run(asyncio.wait_for(open_loop(Stuck(), requests, None, "test"), 30))
    assert len(run.samples) == 20
    start = arrived[0][1] - arrived[0][0].due
    assert all(due - start == pytest.approx(request.due) for request, due in arrived)  # timed from their due times


def test_adapter_is_sent_in_the_selected_field() -> None:
    request = Request([5], 3, "a", 0.0)

    async def go() -> list[dict[str, Any]]:
        async with aiohttp.ClientSession() as session:
            fields = ("model", "lora_path", "both")
            return [Server(session, "http://x/v1", "base", field).body(request) for field in fields]

    chosen = [(body["model"], body.get("lora_path")) for body in asyncio.run(go())]
    assert chosen == [("a", None), ("base", "a"), ("a", "a")]


def run_script(argv: list[str], servers: int) -> tuple[int, list[FakeServer], list[str]]:
    """Runs `bench_serving.main` in a thread against fake servers, whose URLs replace URL0 and URL1 in argv."""

    async def go() -> tuple[int, list[FakeServer], list[str]]:
        fakes = [FakeServer() for _ in range(servers)]
        https = [TestServer(fake.app()) for fake in fakes]
        for http in https:
            await http.start_server()
        urls = [str(http.make_url("/")).rstrip("/") for http in https]
        words = [urls[int(word[3:])] if word.startswith("URL") else word for word in argv]
        try:
            return await asyncio.to_thread(bench_serving.main, words), fakes, urls
        finally:
            for http in https:
                await http.close()

    return asyncio.run(go())


def test_script_measures_one_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "result.json"
    flags = ["--num-requests", "12", "--warmup", "3", "--input-len", "2:4", "--output-len", "3", "--per-adapter"]
    status, (fake,), (url,) = run_script(
        ["--url", "URL0", *flags, "--adapters", "round-robin", "--json", str(out), "--api-key", "hidden"], 1
    )
    assert status == 0
    assert len(fake.bodies) == 15
    result = json.loads(out.read_text())
    assert result["servers"][url]["all"]["output_tokens"] == 36
    assert {name: part["requests"] for name, part in result["servers"][url]["by_adapter"].items()} == {"a": 6, "b": 6}
    assert "hidden" not in out.read_text()
    assert "TPOT p50" in capsys.readouterr().out


def test_script_compares_two_servers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "result.json"
    flags = ["--num-requests", "5", "--output-len", "2", "--repeat", "2", "--warmup", "0", "--request-rate", "5000"]
    status, (one, two), _ = run_script(["--url", "URL0", "--compare", "URL1", *flags, "--json", str(out)], 2)
    assert status == 0
    assert sorted(map(str, one.bodies)) == sorted(map(str, two.bodies))
    assert len({str(body["prompt"]) for body in one.bodies}) == 10  # fresh prompts each round
    assert json.loads(out.read_text())["second_over_first"]["requests/s"]["median"] > 0
    assert "second / first" in capsys.readouterr().out


def test_script_prints_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    for argv, reason in [
        (["--input-len", "0"], "is not a length"),
        (["--request-rate", "0"], "not above zero"),
        (["--url", "http://a", "--compare", "http://a"], "another URL"),
    ]:
        with pytest.raises(SystemExit):
            bench_serving.main(argv)
        assert reason in capsys.readouterr().err
    assert bench_serving.main(["--url", "http://127.0.0.1:9"]) == 1
    assert "cannot reach the server" in capsys.readouterr().err
