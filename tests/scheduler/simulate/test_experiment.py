"""Whole runs: they repeat themselves, everyone ends, routers keep their word, and nobody waits for ever."""

from __future__ import annotations

from dataclasses import replace

import pytest
from fixtures.scheduling.small_world import PROFILE, ask, profile_with
from msgspec.structs import replace as with_fields

from scheduler.simulate.experiment import Experiment, Setup
from scheduler.simulate.profile import StepCost
from scheduler.simulate.trace import Ask, rescale
from scheduler.simulate.workload import KINDS, Workload

SMALL = Workload(adapters=40, rate=60.0, requests=300, prompt=(4, 60), output=(2, 30), base_share=0.1)
TIGHT = profile_with(rows=16, kv_tokens=1024)


@pytest.mark.parametrize("rule", ["chorus", "skip", "drain"])
def test_the_same_again(rule: str) -> None:
    asks, setup = SMALL.asks(), Setup(rule, 4, 8, window=2)
    (one, first), (two, second) = (Experiment(setup, TIGHT).run(asks, load=0.9) for _ in range(2))
    assert one == two
    assert [j.ended for j in first.journeys.values()] == [j.ended for j in second.journeys.values()]


@pytest.mark.parametrize("rule", ["chorus", "skip", "drain"])
@pytest.mark.parametrize("kind", KINDS)
def test_everyone_ends(kind: str, rule: str) -> None:
    asks = replace(SMALL, kind=kind, period=2.0).asks()
    setup = Setup(rule, 4, 8, window=1 + len(kind) % 3, max_loaded=10 if kind == "drift" else None)
    summary, journal = Experiment(setup, TIGHT).run(asks)
    assert summary["failed"] == 0
    assert [j.tokens for j in journal.journeys.values()] == [one.output for one in asks]
    for journey in journal.journeys.values():
        assert journey.arrived <= journey.admitted < journey.first <= journey.ended


@pytest.mark.parametrize("start", ["warm", "cold"])
def test_a_cold_start_loads_what_is_named(start: str) -> None:
    asks = [ask(k * 1.0, f"a{k % 5}") for k in range(10)]
    summary, journal = Experiment(Setup(max_loras=2, pool=8, warm=start == "warm"), PROFILE).run(asks)
    first, again = journal.journeys[0].ttft, journal.journeys[5].ttft
    assert again == pytest.approx(0.0116)
    if start == "warm":
        assert first == pytest.approx(0.0116)
    else:
        assert first >= 0.08 + 0.0116
    assert summary["adapter_loads"] == 5


@pytest.mark.parametrize("router", ["hash", "two", "least"])
def test_routers(router: str) -> None:
    asks = SMALL.asks()
    summary, journal = Experiment(Setup(max_loras=4, pool=8, replicas=5, router=router), TIGHT).run(asks)
    homes: dict[str, set[int]] = {}
    for journey in journal.journeys.values():
        homes.setdefault(journey.ask.adapter or "", set()).add(journey.replica)
    base = homes.pop("")
    assert len(base) > 2
    most = {"hash": 1, "two": 2, "least": 5}[router]
    assert max(len(home) for home in homes.values()) == most
    assert len(set.union(*homes.values())) == 5
    assert summary["requests"] == 300


def test_more_machines_do_more() -> None:
    """More than four times as much, since each serves fewer adapters."""
    asks = SMALL.asks()
    one, four = (
        Experiment(Setup(max_loras=4, pool=8, replicas=count, router="two"), TIGHT).capacity(asks) for count in (1, 4)
    )
    assert 2.0 < four / one < 5.0


def test_capacity_is_what_a_queue_can_bear() -> None:
    """Somewhat below it the queue stays short, above it grows with the trace."""
    asks = replace(SMALL, requests=900).asks()
    experiment = Experiment(Setup(max_loras=40, pool=40), PROFILE)
    most = experiment.capacity(asks)
    below, above = (experiment.run(rescale(asks, share * most))[0]["ttft"]["all"]["p99"] for share in (0.8, 1.5))
    assert below < 0.3
    assert above > 5 * below


def test_a_second_step_in_flight_hides_the_gap() -> None:
    asks = [ask(0.0, None, output=100)]
    profile = profile_with(gap=0.005)
    one, two = (Experiment(Setup(window=window), profile).run(asks)[0]["seconds"] for window in (1, 2))
    assert one - two == pytest.approx(99 * 0.005, rel=0.05)


QUICK = profile_with(rows=64, kv_tokens=65536, step=StepCost(base=0.008, decode_row=0.0001, prefill_token=0.00005))
"""About a second for an answer of a hundred tokens."""


def starving() -> list[Ask]:
    """Eight adapters whose requests never cease, in eight lanes, and now and then one for somebody else."""
    lengths = {"alpha": 0.0, "prompt": (8, 60), "output": (60, 120)}
    hot = Workload(adapters=8, rate=40.0, requests=800, seed=5, **lengths).asks()
    cold = Workload(adapters=50, rate=1.5, requests=30, seed=6, **lengths).asks()
    return sorted(hot + [with_fields(one, adapter=f"c{one.adapter}") for one in cold], key=lambda one: one.at)


@pytest.mark.parametrize("bound", [1.0, 2.0, 4.0])
def test_nobody_starves(bound: float) -> None:
    """Under skip-ahead the others wait for the end of the trace, 18 seconds; under ours for the bound.

    Nor does anyone whose lane was taken for them: its stream pauses for the bound, and what it takes to bring it back.
    """
    costs = profile_with(rows=128, kv_tokens=65536, step=QUICK.step)
    setup = Setup(max_loras=8, pool=32, max_wait=bound)
    summary, _ = Experiment(setup, costs).run(starving(), hot=8)
    assert summary["passed"]["all"]["max"] <= bound + 0.05
    assert summary["itl"]["max"] <= bound + 0.2
    skip, _ = Experiment(replace(setup, rule="skip"), costs).run(starving(), hot=8)
    drain, _ = Experiment(replace(setup, rule="drain"), costs).run(starving(), hot=8)
    assert skip["passed"]["cold"]["max"] > 15
    assert 1 < drain["passed"]["cold"]["max"] < 5


def test_nobody_is_passed_for_longer_than_the_bound() -> None:
    """200 adapters, 16 in a step, a pool for 48, nine tenths of what the machine can do in a closed loop."""
    asks = Workload(adapters=200, requests=1500, prompt=(8, 100), output=(8, 100), seed=5).asks()
    summary, _ = Experiment(Setup(max_loras=16, pool=48, max_wait=2.0), QUICK).run(asks, load=0.9)
    hot, cold = summary["ttft"]["hot"]["p99"], summary["ttft"]["cold"]["p99"]
    load = QUICK.load.of(8_000_000) + QUICK.fill.of(8_000_000)
    assert summary["passed"]["all"]["max"] <= 2.0 + 0.05
    assert cold <= 2 * hot + load
    assert summary["adapter_evictions"] > 100
