"""The rules of others on cases small enough to do by hand, and the scheduler of plain lists that they steer."""

from __future__ import annotations

from dataclasses import dataclass

from fixtures.scheduling.small_world import ask, profile_with

from scheduler.simulate.baselines.rules import Drain, Skip
from scheduler.simulate.experiment import Experiment, Setup
from scheduler.simulate.results.journal import Journal
from scheduler.simulate.trace import Ask


@dataclass
class Waits:
    adapter: int
    arrived: float = 0.0
    remaining: int = 100


def test_skip_lets_in_who_needs_no_lane_more() -> None:
    rule, lanes = Skip(), {1: 7, 2: 7}
    assert rule.permits(Waits(0), lanes, 2)
    assert rule.permits(Waits(2), lanes, 2)
    assert not rule.permits(Waits(3), lanes, 2)
    assert rule.permits(Waits(3), lanes, 3)


def test_drain_takes_the_adapter_that_is_done_soonest_for_each_that_starves() -> None:
    rule, running = Drain(5.0), {1: 50, 2: 10, 3: 80}
    queue = [Waits(8, 0.0), Waits(8, 1.0), Waits(1, 2.0), Waits(9, 3.0)]
    rule.begin(queue, running, True, 4.0)
    assert rule.draining == {}
    rule.begin(queue, running, True, 7.5)  # 8 starves; 1 runs, so nobody of it does
    assert rule.draining == {2: 10}
    assert rule.permits(Waits(2, remaining=12), running, 3)
    assert not rule.permits(Waits(2, remaining=13), running, 3)
    assert rule.permits(Waits(1, remaining=500), running, 3)
    rule.begin(queue, {1: 40, 2: 5, 3: 70}, True, 8.5)  # 9 starves as well
    assert rule.draining == {2: 5, 1: 40}
    rule.begin(queue, {1: 30, 3: 60}, False, 9.0)  # 2 is gone, and a lane free
    assert rule.draining == {1: 30}


def run(rule: str, asks: list[Ask], lanes: int = 1, **profile: object) -> Journal:
    setup = Setup(rule=rule, max_loras=lanes, pool=4, drain_after=0.05)
    summary, journal = Experiment(setup, profile_with(**profile)).run(asks)
    assert summary["failed"] == 0
    return journal


def order(journal: Journal) -> list[int]:
    """Who was admitted, in order."""
    return sorted(journal.journeys, key=lambda number: (journal.journeys[number].admitted, number))


def test_a_stream_of_one_adapter_starves_another_under_skip() -> None:
    asks = [ask(0.0, "a"), ask(0.001, "b"), *[ask(0.05 * k, "a") for k in range(1, 20)]]
    assert order(run("skip", asks))[-1] == 1


def test_drain_ends_the_stream() -> None:
    """b starves from 0.051 on; a drains: its new requests would end later than what runs, so they wait behind b."""
    asks = [ask(0.0, "a"), ask(0.001, "b"), *[ask(0.05 * k, "a") for k in range(1, 20)]]
    place = order(run("drain", asks)).index(1)
    assert place < 5


def test_who_lacks_a_row_is_not_passed() -> None:
    asks = [ask(0.0, "a", output=30), ask(0.001, "b"), ask(0.002, None)]
    journal = run("skip", asks, lanes=2, rows=1)
    assert order(journal) == [0, 1, 2]


def test_who_lacks_a_lane_is() -> None:
    asks = [ask(0.0, "a", output=30), ask(0.001, "b"), ask(0.002, None)]
    assert order(run("skip", asks, lanes=1)) == [0, 2, 1]


def test_alone_both_schedulers_take_the_same_time() -> None:
    """Where no rule has anything to say, the plain one does what ours does."""
    asks = [ask(0.3 * k, f"a{k % 3}", prompt=20 + k, output=5 + k) for k in range(12)]
    ours, plain = run("chorus", asks, lanes=4), run("skip", asks, lanes=4)
    for number, journey in ours.journeys.items():
        assert journey.ended == plain.journeys[number].ended, number
        assert journey.first == plain.journeys[number].first, number


def test_memory_runs_out_and_everyone_ends() -> None:
    asks = [ask(0.001 * k, f"a{k % 5}", prompt=40, output=60) for k in range(40)]
    setup = Setup(rule="skip", max_loras=4, pool=4, window=2)
    summary, journal = Experiment(setup, profile_with(kv_tokens=512)).run(asks)
    assert summary["preemptions"] > 5
    assert all(journey.tokens == 60 for journey in journal.journeys.values())
