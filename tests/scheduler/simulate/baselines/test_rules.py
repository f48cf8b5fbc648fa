"""scheduler.simulate.baselines: the admission rules of other engines, and the baseline scheduler that uses them."""

from __future__ import annotations

from dataclasses import dataclass

from fixtures.scheduling.small_world import profile_with, trace_request

from scheduler.simulate.baselines.rules import DrainStarving, SkipAhead
from scheduler.simulate.experiment import Experiment, Setup
from scheduler.simulate.results.request_log import RequestLog
from scheduler.simulate.trace import TraceRequest


@dataclass
class FakeWaiter:
    adapter: int
    arrived: float = 0.0
    remaining: int = 100


def test_skip_admits_requests_that_need_no_further_lane() -> None:
    rule, lanes = SkipAhead(), {1: 7, 2: 7}
    assert rule.permits(FakeWaiter(0), lanes, 2)
    assert rule.permits(FakeWaiter(2), lanes, 2)
    assert not rule.permits(FakeWaiter(3), lanes, 2)
    assert rule.permits(FakeWaiter(3), lanes, 3)


def test_drain_chooses_the_adapter_that_ends_soonest() -> None:
    rule, running = DrainStarving(5.0), {1: 50, 2: 10, 3: 80}
    queue = [FakeWaiter(8, 0.0), FakeWaiter(8, 1.0), FakeWaiter(1, 2.0), FakeWaiter(9, 3.0)]
    rule.begin(queue, running, True, 4.0)
    assert rule.draining == {}
    rule.begin(queue, running, True, 7.5)  # adapter 8 starves; adapter 1 is running, so it does not
    assert rule.draining == {2: 10}
    assert rule.permits(FakeWaiter(2, remaining=12), running, 3)
    assert not rule.permits(FakeWaiter(2, remaining=13), running, 3)
    assert rule.permits(FakeWaiter(1, remaining=500), running, 3)
    rule.begin(queue, {1: 40, 2: 5, 3: 70}, True, 8.5)  # adapter 9 starves as well
    assert rule.draining == {2: 5, 1: 40}
    rule.begin(queue, {1: 30, 3: 60}, False, 9.0)  # adapter 2 has ended, so a lane is free
    assert rule.draining == {1: 30}


def run(rule: str, requests: list[TraceRequest], lanes: int = 1, **profile: object) -> RequestLog:
    setup = Setup(rule=rule, max_loras=lanes, pool=4, drain_after=0.05)
    summary, log = Experiment(setup, profile_with(**profile)).run(requests)
    assert summary["failed"] == 0
    return log


def order(log: RequestLog) -> list[int]:
    """Returns the numbers of the requests in order of their admission."""
    return sorted(log.timelines, key=lambda number: (log.timelines[number].admitted, number))


def test_skip_lets_one_adapters_stream_starve_another() -> None:
    requests = [
        trace_request(0.0, "a"),
        trace_request(0.001, "b"),
        *[trace_request(0.05 * k, "a") for k in range(1, 20)],
    ]
    assert order(run("skip", requests))[-1] == 1


def test_drain_ends_the_stream_for_a_starving_adapter() -> None:
    """Adapter b starves from 0.051 s on, so a drains: its new requests would end too late, and wait for b."""
    requests = [
        trace_request(0.0, "a"),
        trace_request(0.001, "b"),
        *[trace_request(0.05 * k, "a") for k in range(1, 20)],
    ]
    position = order(run("drain", requests)).index(1)
    assert position < 5


def test_request_without_a_row_is_not_passed() -> None:
    requests = [trace_request(0.0, "a", output=30), trace_request(0.001, "b"), trace_request(0.002, None)]
    log = run("skip", requests, lanes=2, rows=1)
    assert order(log) == [0, 1, 2]


def test_request_without_a_lane_is_passed() -> None:
    requests = [trace_request(0.0, "a", output=30), trace_request(0.001, "b"), trace_request(0.002, None)]
    assert order(run("skip", requests, lanes=1)) == [0, 2, 1]


def test_baseline_takes_the_same_time_where_no_rule_acts() -> None:
    """With enough lanes for all adapters, each request ends at the same time in the baseline and in the real core."""
    requests = [trace_request(0.3 * k, f"a{k % 3}", prompt=20 + k, output=5 + k) for k in range(12)]
    core, baseline = run("chorus", requests, lanes=4), run("skip", requests, lanes=4)
    for number, timeline in core.timelines.items():
        assert timeline.ended == baseline.timelines[number].ended, number
        assert timeline.first == baseline.timelines[number].first, number


def test_all_requests_end_when_memory_runs_out() -> None:
    requests = [trace_request(0.001 * k, f"a{k % 5}", prompt=40, output=60) for k in range(40)]
    setup = Setup(rule="skip", max_loras=4, pool=4, window=2)
    summary, log = Experiment(setup, profile_with(kv_tokens=512)).run(requests)
    assert summary["preemptions"] > 5
    assert all(timeline.tokens == 60 for timeline in log.timelines.values())
