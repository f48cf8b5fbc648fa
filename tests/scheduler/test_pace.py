"""When the second step may be planned: at once beside a GPU, shortly before the first one's end on a CPU."""

from __future__ import annotations

from typing import Any

import pytest

from engine.config import Links, SchedulerConfig
from engine.messages import Capacity, Chunk, Generate, RunnerReady, Sampling, Step, StepDone, Stopping
from scheduler import serve
from scheduler.pace import LEAD_SECONDS, LEAD_SHARE, LONG_SECONDS, Pace
from scheduler.serve import Loop


def step(number: int, *lengths: int) -> Step:
    chunks = [Chunk(row=row, generation=1, start=0, length=length) for row, length in enumerate(lengths)]
    return Step(epoch=0, id=number, chunks=chunks)


def run(pace: Pace, number: int, at: float, seconds: float, *lengths: int) -> None:
    """A step that nothing overlaps."""
    pace.sent(step(number, *lengths), at)
    pace.done(StepDone(epoch=0, id=number, seconds=seconds), at + seconds)


def test_a_device_of_its_own_is_never_kept_waiting() -> None:
    pace = Pace(window=2, holds=False)
    run(pace, 1, 0.0, 0.1, 1)
    pace.sent(step(2, 1), 1.0)
    assert pace.due == float("-inf")
    pace.sent(step(3, 1), 1.0)
    assert pace.due == float("inf")  # full


def test_what_is_not_known_is_not_waited_for() -> None:
    pace = Pace(window=2, holds=True)
    assert pace.due == float("-inf")
    pace.sent(step(1, 1), 5.0)
    assert pace.due <= 5.0


def test_a_plan_is_due_shortly_before_the_expected_end() -> None:
    pace = Pace(window=2, holds=True)
    for number, seconds in ((1, 0.100), (2, 0.120), (3, 0.110)):
        run(pace, number, float(number), seconds, 1, 1)
    pace.sent(step(4, 1, 1, 1), 10.0)
    assert pace.due == pytest.approx(10.0 + 0.100 * (1 - LEAD_SHARE))
    pace.sent(step(5, 1), 10.09)
    assert pace.due == float("inf")
    pace.done(StepDone(epoch=0, id=4, seconds=0.1), 10.1)
    assert pace.due == pytest.approx(10.1 + 0.100 * (1 - LEAD_SHARE))  # step 5 began when step 4 ended


def test_short_steps_are_planned_at_once() -> None:
    pace = Pace(window=2, holds=True)
    run(pace, 1, 0.0, LEAD_SECONDS / 2, 1)
    pace.sent(step(2, 1), 1.0)
    assert pace.due < 1.0


def test_the_end_of_a_long_step_is_waited_for() -> None:
    pace = Pace(window=2, holds=True)
    run(pace, 1, 0.0, 2 * LONG_SECONDS, 1)
    pace.sent(step(2, 1), 1.0)
    assert pace.due == float("inf")
    pace.done(StepDone(epoch=0, id=2, seconds=2 * LONG_SECONDS), 1.4)
    assert pace.due == float("-inf")


def test_prefills_are_judged_by_their_tokens_and_fills_by_nothing() -> None:
    pace = Pace(window=2, holds=True)
    run(pace, 1, 0.0, 0.010, 1)
    run(pace, 2, 1.0, 0.400, 1, 399)
    pace.sent(step(3, 100), 2.0)
    assert pace.due == pytest.approx(2.0 + 0.100 * (1 - LEAD_SHARE))
    pace.done(StepDone(epoch=0, id=3, seconds=0.1), 2.1)
    pace.sent(step(4), 3.0)  # fills only
    assert pace.due <= 3.0


def test_a_late_word_of_a_former_runner_changes_nothing() -> None:
    pace = Pace(window=2, holds=True)
    run(pace, 8, 0.0, 0.1, 1)
    pace.sent(step(9, 1), 1.0)
    pace.done(StepDone(epoch=0, id=7, seconds=9.0), 1.0)
    assert pace.due == pytest.approx(1.0 + 0.1 * (1 - LEAD_SHARE))


class Clocked:
    """An inbox and an outbox for a loop, and the time: waiting moves it on."""

    def __init__(self) -> None:
        self.now = 100.0
        self.arriving: list[tuple[float, Any]] = []
        self.sent: list[tuple[float, Any]] = []

    def receive(self, patience: float | None) -> list[Any]:
        until = float("inf") if patience is None else self.now + patience
        if self.arriving and self.arriving[0][0] <= until:
            at, message = self.arriving.pop(0)
            self.now = max(self.now, at)
            return [message]
        assert patience is not None, "it would wait for ever"
        self.now = until
        return []

    def send(self, message: Any) -> None:
        self.sent.append((self.now, message))

    @property
    def steps(self) -> list[tuple[float, Step]]:
        return [(at, message) for at, message in self.sent if isinstance(message, Step)]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_loop_holds_a_cpus_second_step_until_it_is_due(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    house: Any = Clocked()
    monkeypatch.setattr(serve.time, "monotonic", lambda: house.now)
    links = Links(tokenizer="", scheduler="", runner="", door="")
    loop = Loop(SchedulerConfig(links=links), house, house)
    capacity = Capacity(
        kv_pages=64, page_size=4, rows=4, max_length=64, max_batched_tokens=32, vocab_size=97, device=device
    )

    def ask(number: int) -> Generate:
        stopping, sampling = Stopping(max_tokens=40), Sampling(temperature=0.0)
        return Generate(epoch=0, request_id=number, prompt=[1, 2, 3], sampling=sampling, stopping=stopping)

    def turn_until(count: int) -> None:
        for _ in range(50):
            if len(house.steps) >= count:
                return
            loop.turn()
        raise AssertionError(f"{len(house.steps)} steps")

    house.arriving = [(100.0, RunnerReady(epoch=0, capacity=capacity)), (100.0, ask(1))]
    turn_until(2)  # nothing is known of steps yet: both at once
    for number in range(1, 6):  # the prefill, then decodes of 0.1 s
        seconds = 0.03 if number == 1 else 0.1
        house.arriving.append((house.now + seconds, StepDone(epoch=0, id=number, tokens=[5], seconds=seconds)))
        turn_until(2 + number)
    assert house.steps[-1][1].id == 7
    ended = house.now + 0.1
    house.arriving = [(ended, StepDone(epoch=0, id=6, tokens=[5], seconds=0.1))]  # step 7 begins
    turn_until(8)
    held = house.steps[-1][0] - ended
    assert held == pytest.approx(0.0 if device == "cuda" else 0.1 * (1 - LEAD_SHARE), abs=0.003)
