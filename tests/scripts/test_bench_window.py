"""The comparison of two windows: which rounds are compared, which server is first, and the time outside of steps."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import bench_window
import pytest
from bench.client import Sample
from bench.loops import Run
from bench_window import ONE, Runs, computed, launched, main, make_requests, point


def run(tokens: int, seconds: float, ttft: float = 0.5, gap: float = 0.1) -> Run:
    """Returns a run of `seconds` with one output of `tokens` tokens."""
    pieces = [ttft + gap * n for n in range(tokens)]
    return Run([Sample(None, tokens, pieces, tokens, 1, pieces[-1])], seconds)


class LateMetrics:
    """A server whose step counts arrive late; each step took a quarter of a second."""

    def __init__(self, *steps: float) -> None:
        self._steps = iter(steps)
        self._last = 0.0

    def metric(self, name: str) -> float:
        if name == "chorus:step_seconds_sum":
            return self._last / 4
        assert name == "chorus:step_seconds_count"
        self._last = next(self._steps)
        return self._last


@pytest.mark.parametrize(("told", "end"), [((4.0, 4.0), 4.0), ((4.0, 6.0, 7.0, 7.0, 9.0), 7.0), ((0.0, 0.0), 0.0)])
def test_steps_are_read_once_they_stop_changing(
    told: tuple[float, ...], end: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_window, "TOLD_SECONDS", 0.0)
    assert asyncio.run(computed(LateMetrics(*told))) == (end, end / 4)  # type: ignore[arg-type]


def test_closed_run_is_split_into_steps_and_other_time(monkeypatch: pytest.MonkeyPatch) -> None:
    async def loop(*_: object) -> Run:
        return run(10, seconds=8.0)

    monkeypatch.setattr(bench_window, "TOLD_SECONDS", 0.0)
    monkeypatch.setattr(bench_window, "closed_loop", loop)
    side = bench_window.Side(LateMetrics(8.0, 8.0, 20.0, 32.0, 32.0), None, Runs())  # type: ignore[arg-type]
    asyncio.run(side.close([], 1, ""))
    assert side.runs.steps == [24.0]
    assert side.runs.beside == [pytest.approx(0.25)]
    assert [one.seconds for one in side.runs.closed] == [8.0]


def test_figures_are_over_all_rounds() -> None:
    closed = [run(10, 1.0), run(10, 1.0), run(10, 1.0)], [run(10, 2.0), run(10, 0.5), run(10, 0.8)]
    one = Runs(closed[0], [100, 200, 100], [0.02, 0.03, 0.07], [run(10, 1.0, ttft=0.5)])
    two = Runs(closed[1], [110, 210, 101], [0.01, 0.04, 0.02], [run(10, 1.0, ttft=0.55)])
    found = point("tiny", 8, one, two)
    assert found.rate == pytest.approx({"median": 1.25, "lowest": 0.5, "highest": 2.0})
    assert found.steps == pytest.approx(1.05)
    assert found.beside == (0.03, 0.02)
    assert found.later == pytest.approx(0.5)
    assert found.rounds["output_tokens_per_s"] == (pytest.approx([10, 10, 10]), pytest.approx([5, 20, 12.5]))
    assert found.rounds["beside"] == ([0.02, 0.03, 0.07], [0.01, 0.04, 0.02])
    assert "1.250    0.500    2.000" in found.line("all")
    last = point("tiny", 8, one.since(2), two.since(2))
    assert last.rate["lowest"] == last.rate["highest"] == pytest.approx(1.25)
    assert last.ttft_ms is last.later is None


def test_prompts_differ_between_concurrencies() -> None:
    small, large = (
        {tuple(request.prompt) for request in make_requests(concurrency, 20, 3, None)} for concurrency in (8, 32)
    )
    assert len(small) == len(large) == 20
    assert not small & large


def test_first_launched_server_alternates(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[bool] = []

    class Server:
        def __init__(self, *flags: object) -> None:
            self.one = ONE in flags

        def __enter__(self) -> Self:
            started.append(self.one)
            return self

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(bench_window, "LaunchedServer", Server)
    for part in ("make_model", "make_adapter"):
        monkeypatch.setattr(bench_window, part, lambda *_: Path("x"))
    for launch in range(2):
        with launched("tiny", launch, []) as servers:
            assert [server.one for server in servers] == [True, False]  # type: ignore[attr-defined]
    assert started == [True, False, False, True]


def test_launches_are_printed_one_by_one_and_together(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    @contextmanager
    def start(shape: str, launch: int, flags: Sequence[str]) -> Iterator[list[float]]:
        yield [1.0, (0.5, 2.0, 1.0)[launch]]  # seconds of a run

    async def measure(servers: list[float], runs: Sequence[Runs], *rest: Any) -> None:
        seeds, with_open = rest[2:]
        assert not with_open
        for seconds, into in zip(servers, runs, strict=True):
            into.closed += [run(10, seconds) for _ in seeds]
            into.steps += [100.0 for _ in seeds]
            into.beside += [0.1 * seed for seed in seeds]

    monkeypatch.setattr(bench_window, "launched", start)
    monkeypatch.setattr(bench_window, "measure", measure)
    flags = ["--shapes", "tiny", "--concurrency", "1", "4", "--launches", "3", "--rounds", "1", "--closed-only"]
    assert main([*flags, "--json", str(tmp_path / "out.json")]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert [(line[1], line[2], line[4]) for line in lines] == [
        *((c, n, r) for n, r in (("1", "2.000"), ("2", "0.500"), ("3", "1.000")) for c in ("1", "4")),
        ("1", "all", "1.000"),
        ("4", "all", "1.000"),
    ]
    written = json.loads((tmp_path / "out.json").read_text())
    assert [part["concurrency"] for part in written] == [1, 4]
    assert written[0]["beside"] == [pytest.approx(0.1)] * 2
    assert written[0]["rounds"]["output_tokens_per_s"][1] == pytest.approx([20, 5, 10])
