"""When the second step may be planned: at once beside a GPU, shortly before the first one's end on a CPU."""

from __future__ import annotations

from typing import Any

import pytest

from engine.config.sections import Links, SchedulerConfig
from engine.messages import Capacity, Chunk, Generate, RunnerReady, Sampling, Step, StepDone, Stopping
from scheduler import server
from scheduler.batching import async_gate as pacing
from scheduler.batching.async_gate import LEAD_SECONDS, LEAD_SHARE, AsyncGate
from scheduler.batching.overlap_tuner import COUNTED, SETTLING, OverlapTuner
from scheduler.server import Loop


class Told(OverlapTuner):
    """Pays or not as it is told, and keeps what else it is told."""

    def __init__(self, pays: bool = True) -> None:
        super().__init__()
        self._pays = pays
        self.told: list[tuple[int, int, float, float]] = []

    @property
    def pays(self) -> bool:
        return self._pays

    def took(self, rows: int, prompt: int, period: float, computed: float) -> None:
        self.told.append((rows, prompt, round(period, 6), computed))


def step(number: int, *lengths: int) -> Step:
    chunks = [Chunk(row=row, generation=1, start=0, length=length) for row, length in enumerate(lengths)]
    return Step(epoch=0, id=number, chunks=chunks)


def ended(pace: AsyncGate, number: int, at: float, seconds: float = 0.1) -> None:
    pace.done(StepDone(epoch=0, id=number, seconds=seconds), at)


def run(pace: AsyncGate, number: int, at: float, seconds: float, *lengths: int) -> None:
    """A step that nothing overlaps."""
    pace.sent(step(number, *lengths), at)
    ended(pace, number, at + seconds, seconds)


def test_a_device_of_its_own_is_never_kept_waiting() -> None:
    pace = AsyncGate(window=2, holds=False, overlap=Told(pays=False))
    run(pace, 1, 0.0, 0.1, 1)
    pace.sent(step(2, 1), 1.0)
    assert pace.due == float("-inf")
    pace.sent(step(3, 1), 1.0)
    assert pace.due == float("inf")  # full


def test_what_is_not_known_is_not_waited_for() -> None:
    pace = AsyncGate(window=2, holds=True, overlap=Told())
    assert pace.due == float("-inf")
    pace.sent(step(1, 1), 5.0)
    assert pace.due <= 5.0


def test_where_overlapping_does_not_pay_the_end_of_a_step_is_waited_for() -> None:
    pace = AsyncGate(window=2, holds=True, overlap=Told(pays=False))
    run(pace, 1, 0.0, 0.1, 1)
    assert pace.due == float("-inf")
    pace.sent(step(2, 1), 1.0)
    assert pace.due == float("inf")
    ended(pace, 2, 1.1)
    assert pace.due == float("-inf")


def test_a_plan_is_due_shortly_before_the_expected_end() -> None:
    pace = AsyncGate(window=2, holds=True, overlap=Told())
    for number, seconds in ((1, 0.100), (2, 0.120), (3, 0.110)):
        run(pace, number, float(number), seconds, 1, 1)
    pace.sent(step(4, 1, 1, 1), 10.0)
    assert pace.due == pytest.approx(10.0 + 0.100 * (1 - LEAD_SHARE))
    pace.sent(step(5, 1), 10.09)
    assert pace.due == float("inf")
    ended(pace, 4, 10.1)
    assert pace.due == pytest.approx(10.1 + 0.100 * (1 - LEAD_SHARE))  # step 5 began when step 4 ended


def test_short_steps_are_planned_at_once() -> None:
    pace = AsyncGate(window=2, holds=True, overlap=Told())
    run(pace, 1, 0.0, LEAD_SECONDS / 2, 1)
    pace.sent(step(2, 1), 1.0)
    assert pace.due < 1.0


def test_prefills_are_judged_by_their_tokens_and_fills_by_nothing() -> None:
    pace = AsyncGate(window=2, holds=True, overlap=Told())
    run(pace, 1, 0.0, 0.010, 1)
    run(pace, 2, 1.0, 0.400, 1, 399)
    pace.sent(step(3, 100), 2.0)
    assert pace.due == pytest.approx(2.0 + 0.100 * (1 - LEAD_SHARE))
    ended(pace, 3, 2.1)
    pace.sent(step(4), 3.0)  # fills only
    assert pace.due <= 3.0


def test_a_late_word_of_a_former_runner_changes_nothing() -> None:
    told = Told()
    pace = AsyncGate(window=2, holds=True, overlap=told)
    run(pace, 8, 0.0, 0.1, 1)
    pace.sent(step(9, 1), 1.0)
    ended(pace, 7, 1.0, 9.0)
    assert pace.due == pytest.approx(1.0 + 0.1 * (1 - LEAD_SHARE))
    assert told.told == []


@pytest.mark.parametrize("window", [1, 2, 3])
def test_periods_go_from_end_to_end_however_many_are_in_flight(window: int) -> None:
    told = Told()
    pace, sent = AsyncGate(window, holds=True, overlap=told), 0
    for number in range(1, 6):
        while sent < number - 1 + window:
            sent += 1
            pace.sent(step(sent, 1, 1, 40), 0.1 * (number - 1) + 0.01)
        assert pace.due == float("inf"), "full"
        ended(pace, number, 0.1 * number, 0.08)
    assert told.told == [(3, 40, 0.1, 0.08)] * 4, "the first one had none before it"


def test_time_without_work_is_no_period() -> None:
    told = Told()
    pace = AsyncGate(window=2, holds=True, overlap=told)
    run(pace, 1, 0.0, 0.1, 1)
    pace.rests()
    run(pace, 2, 5.0, 0.1, 1)
    run(pace, 3, 5.15, 0.1, 1)
    assert told.told == [(1, 0, 0.15, 0.1)]
    pace.sent(step(4, 1), 5.3)
    pace.rests()  # nothing more to be planned, but one step is in flight: it goes on
    ended(pace, 4, 5.4)
    assert told.told[1:] == [(1, 0, 0.15, 0.1)]


def test_steps_that_only_fill_are_not_told_of() -> None:
    told = Told()
    pace = AsyncGate(window=2, holds=True, overlap=told)
    for number in range(1, 4):
        run(pace, number, float(number), 0.1)
    assert told.told == []


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


def ask(number: int) -> Generate:
    stopping, sampling = Stopping(max_tokens=50), Sampling(temperature=0.0)
    return Generate(epoch=0, request_id=number, prompt=[1, 2, 3], sampling=sampling, stopping=stopping)


class Running:
    """A loop, and a runner that takes 0.1 s for a step, of which it says that it computed 0.09 s."""

    def __init__(self, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.house: Any = Clocked()
        monkeypatch.setattr(server.time, "monotonic", lambda: self.house.now)
        self.capacity = Capacity(
            kv_pages=64, page_size=4, rows=4, max_length=64, max_batched_tokens=32, vocab_size=97, device=device
        )
        links = Links(tokenizer="", scheduler="", runner="", door="")
        self.loop = Loop(SchedulerConfig(links=links), self.house, self.house)
        self.ready(epoch=0)
        self.free = 0.0

    def ready(self, epoch: int) -> None:
        self.house.arriving.append((self.house.now, RunnerReady(epoch=epoch, capacity=self.capacity)))

    def steps(self, count: int, epoch: int = 0) -> list[float]:
        """How long after it could have begun each one was sent; below zero: before the one in front had ended."""
        before = len(self.house.steps)
        known, late = before, []
        for _ in range(50 * count):
            if len(late) >= count:
                return late
            self.loop.turn()
            for at, sent in self.house.steps[known:]:
                known += 1
                late.append(at - max(self.free, 0.0))
                self.free = max(at, self.free) + 0.1
                done = StepDone(epoch=epoch, id=sent.id, tokens=[5], seconds=0.09)
                self.house.arriving.append((self.free, done))
        raise AssertionError(f"{len(late)} steps")


def test_the_loop_plans_ahead_beside_a_device_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    running = Running("cuda", monkeypatch)
    running.house.arriving.append((100.0, ask(1)))
    assert running.steps(10)[1:] == pytest.approx([-0.1] * 9)


def test_the_loop_waits_for_a_cpu_and_tries_to_plan_shortly_before_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    running = Running("cpu", monkeypatch)
    running.house.arriving.append((100.0, ask(1)))
    late = running.steps(1 + 2 * (SETTLING + COUNTED))
    waited, early = late[1 : SETTLING + COUNTED], late[2 + SETTLING + COUNTED :]
    assert waited == pytest.approx([0.0] * len(waited), abs=1e-6)
    assert early == pytest.approx([0.09 * (1 - LEAD_SHARE) - 0.1] * len(early), abs=0.003)


def test_the_loop_tells_of_no_idle_time_and_begins_anew_with_a_new_runner(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Told] = []

    def make() -> Told:
        made.append(Told(pays=False))
        return made[-1]

    monkeypatch.setattr(pacing, "OverlapTuner", make)
    running = Running("cpu", monkeypatch)
    running.house.arriving.append((100.0, ask(1)))
    running.steps(50)
    running.house.arriving += [(110.0, ask(2))]  # half of the time nobody asked
    running.steps(5)
    first = made[-1]
    assert [told[2] for told in first.told] == [0.1] * 52
    running.house.arriving.clear()
    running.ready(epoch=1)
    running.steps(5, epoch=1)
    assert [len(each.told) for each in made[-2:]] == [52, 3]
