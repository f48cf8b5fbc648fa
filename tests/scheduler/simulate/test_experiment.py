"""scheduler.simulate.experiment: runs are repeatable, all requests end, and later requests overtake an earlier one for
at most `max_wait`.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from fixtures.scheduling.small_world import PROFILE, profile_with, trace_request
from msgspec.structs import replace as with_fields

from scheduler.simulate.experiment import Experiment, Setup
from scheduler.simulate.profile import StepCost
from scheduler.simulate.trace import TraceRequest, rescale
from scheduler.simulate.workload import KINDS, Workload

SMALL = Workload(adapters=40, rate=60.0, requests=300, prompt=(4, 60), output=(2, 30), base_share=0.1)
TIGHT = profile_with(rows=16, kv_tokens=1024)


@pytest.mark.parametrize("rule", ["chorus", "skip", "drain"])
def test_run_is_repeatable(rule: str) -> None:
    requests, setup = SMALL.generate(), Setup(rule, 4, 8, window=2)
    (one, first), (two, second) = (Experiment(setup, TIGHT).run(requests, load=0.9) for _ in range(2))
    assert one == two
    assert [j.ended for j in first.timelines.values()] == [j.ended for j in second.timelines.values()]


@pytest.mark.parametrize("rule", ["chorus", "skip", "drain"])
@pytest.mark.parametrize("kind", KINDS)
def test_all_requests_end(kind: str, rule: str) -> None:
    requests = replace(SMALL, kind=kind, period=2.0).generate()
    setup = Setup(rule, 4, 8, window=1 + len(kind) % 3, max_loaded=10 if kind == "drift" else None)
    summary, log = Experiment(setup, TIGHT).run(requests)
    assert summary["failed"] == 0
    assert [j.tokens for j in log.timelines.values()] == [one.output for one in requests]
    for timeline in log.timelines.values():
        assert timeline.arrived <= timeline.admitted < timeline.first <= timeline.ended


@pytest.mark.parametrize("start", ["warm", "cold"])
def test_cold_start_loads_adapters_at_their_first_request(start: str) -> None:
    requests = [trace_request(k * 1.0, f"a{k % 5}") for k in range(10)]
    summary, log = Experiment(Setup(max_loras=2, pool=8, warm=start == "warm"), PROFILE).run(requests)
    first, again = log.timelines[0].ttft, log.timelines[5].ttft
    assert again == pytest.approx(0.0116)
    if start == "warm":
        assert first == pytest.approx(0.0116)
    else:
        assert first >= 0.08 + 0.0116
    assert summary["adapter_loads"] == 5


@pytest.mark.parametrize("router", ["hash", "two", "least"])
def test_router_keeps_an_adapter_on_its_replicas(router: str) -> None:
    requests = SMALL.generate()
    summary, log = Experiment(Setup(max_loras=4, pool=8, replicas=5, router=router), TIGHT).run(requests)
    homes: dict[str, set[int]] = {}
    for timeline in log.timelines.values():
        homes.setdefault(timeline.request.adapter or "", set()).add(timeline.replica)
    base = homes.pop("")
    assert len(base) > 2
    most = {"hash": 1, "two": 2, "least": 5}[router]
    assert max(len(home) for home in homes.values()) == most
    assert len(set.union(*homes.values())) == 5
    assert summary["requests"] == 300


def test_four_replicas_serve_more_than_one() -> None:
    """Four replicas may serve more than four times as much as one, because each serves fewer adapters."""
    requests = SMALL.generate()
    one, four = (
        Experiment(Setup(max_loras=4, pool=8, replicas=count, router="two"), TIGHT).capacity(requests)
        for count in (1, 4)
    )
    assert 2.0 < four / one < 5.0


def test_capacity_is_the_load_that_keeps_the_queue_short() -> None:
    """Below the capacity the queue stays short; above it, the queue grows with the trace."""
    requests = replace(SMALL, requests=900).generate()
    experiment = Experiment(Setup(max_loras=40, pool=40), PROFILE)
    capacity = experiment.capacity(requests)
    below, above = (
        experiment.run(rescale(requests, share * capacity))[0]["ttft"]["all"]["p99"] for share in (0.8, 1.5)
    )
    assert below < 0.3
    assert above > 5 * below


def test_second_step_in_flight_hides_the_gap() -> None:
    requests = [trace_request(0.0, None, output=100)]
    profile = profile_with(gap=0.005)
    one, two = (Experiment(Setup(window=window), profile).run(requests)[0]["seconds"] for window in (1, 2))
    assert one - two == pytest.approx(99 * 0.005, rel=0.05)


QUICK = profile_with(rows=64, kv_tokens=65536, step=StepCost(base=0.008, decode_row=0.0001, prefill_token=0.00005))
"""A profile with which a request of a hundred generated tokens takes about a second."""


def starving_trace() -> list[TraceRequest]:
    """Returns a trace of constant requests for eight adapters, for eight lanes, and rare requests for fifty others."""
    lengths = {"alpha": 0.0, "prompt": (8, 60), "output": (60, 120)}
    hot = Workload(adapters=8, rate=40.0, requests=800, seed=5, **lengths).generate()
    cold = Workload(adapters=50, rate=1.5, requests=30, seed=6, **lengths).generate()
    return sorted(hot + [with_fields(one, adapter=f"c{one.adapter}") for one in cold], key=lambda one: one.at)


@pytest.mark.parametrize("bound", [1.0, 2.0, 4.0])
def test_cold_adapters_do_not_starve(bound: float) -> None:
    """Under the rule skip a cold adapter waits until the trace ends (18 s); in the real core at most for `max_wait`.

    A request whose lane was preempted pauses for at most `max_wait` and the time to recompute its tokens.
    """
    costs = profile_with(rows=128, kv_tokens=65536, step=QUICK.step)
    setup = Setup(max_loras=8, pool=32, max_wait=bound)
    summary, _ = Experiment(setup, costs).run(starving_trace(), hot=8)
    assert summary["passed"]["all"]["max"] <= bound + 0.05
    assert summary["itl"]["max"] <= bound + 0.2
    skip, _ = Experiment(replace(setup, rule="skip"), costs).run(starving_trace(), hot=8)
    drain, _ = Experiment(replace(setup, rule="drain"), costs).run(starving_trace(), hot=8)
    assert skip["passed"]["cold"]["max"] > 15
    assert 1 < drain["passed"]["cold"]["max"] < 5


def test_no_request_is_passed_for_longer_than_max_wait() -> None:
    """The bound holds with 200 adapters, 16 lanes and a pool for 48 adapters, at 0.9 of the capacity."""
    requests = Workload(adapters=200, requests=1500, prompt=(8, 100), output=(8, 100), seed=5).generate()
    summary, _ = Experiment(Setup(max_loras=16, pool=48, max_wait=2.0), QUICK).run(requests, load=0.9)
    hot, cold = summary["ttft"]["hot"]["p99"], summary["ttft"]["cold"]["p99"]
    load = QUICK.load.of(8_000_000) + QUICK.fill.of(8_000_000)
    assert summary["passed"]["all"]["max"] <= 2.0 + 0.05
    assert cold <= 2 * hot + load
    assert summary["adapter_evictions"] > 100
