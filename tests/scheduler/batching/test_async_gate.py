"""scheduler.batching.async_gate: a second step is planned at once for a GPU, near the end of the first for a CPU."""

from __future__ import annotations

from typing import Any

import pytest

from engine.config.process_configs import Endpoints, SchedulerConfig
from engine.messages import Capacity, Chunk, Generate, RunnerReady, Sampling, Step, StepDone, Stopping
from scheduler import server
from scheduler.batching import async_gate
from scheduler.batching.async_gate import LEAD_SECONDS, LEAD_SHARE, AsyncGate
from scheduler.batching.overlap_tuner import COUNTED_STEPS, SETTLING_STEPS, OverlapTuner
from scheduler.server import Loop

BLOCK = SETTLING_STEPS + COUNTED_STEPS


class FakeTuner(OverlapTuner):
    """A tuner with a fixed `pays` that records the calls of `step_took`."""

    def __init__(self, pays: bool = True) -> None:
        super().__init__()
        self._pays = pays
        self.calls: list[tuple[int, int, float, float]] = []

    @property
    def pays(self) -> bool:
        return self._pays

    def step_took(self, rows: int, prompt_tokens: int, period: float, computed: float) -> None:
        self.calls.append((rows, prompt_tokens, round(period, 6), computed))


def step(number: int, *lengths: int) -> Step:
    chunks = [Chunk(row=row, generation=1, start=0, length=length) for row, length in enumerate(lengths)]
    return Step(epoch=0, id=number, chunks=chunks)


def ended(gate: AsyncGate, number: int, at: float, seconds: float = 0.1) -> None:
    gate.step_done(StepDone(epoch=0, id=number, seconds=seconds), at)


def run(gate: AsyncGate, number: int, at: float, seconds: float, *lengths: int) -> None:
    """Sends a step at `at` and ends it after `seconds`, with no other step in flight."""
    gate.step_sent(step(number, *lengths), at)
    ended(gate, number, at + seconds, seconds)


def test_plan_is_not_held_back_beside_a_gpu() -> None:
    gate = AsyncGate(window=2, hold_back=False, tuner=FakeTuner(pays=False))
    run(gate, 1, 0.0, 0.1, 1)
    gate.step_sent(step(2, 1), 1.0)
    assert gate.due == float("-inf")
    gate.step_sent(step(3, 1), 1.0)
    assert gate.due == float("inf")  # the window is full


def test_plan_is_due_at_once_before_any_step_was_timed() -> None:
    gate = AsyncGate(window=2, hold_back=True, tuner=FakeTuner())
    assert gate.due == float("-inf")
    gate.step_sent(step(1, 1), 5.0)
    assert gate.due <= 5.0


def test_plan_waits_for_the_end_where_overlap_does_not_pay() -> None:
    gate = AsyncGate(window=2, hold_back=True, tuner=FakeTuner(pays=False))
    run(gate, 1, 0.0, 0.1, 1)
    assert gate.due == float("-inf")
    gate.step_sent(step(2, 1), 1.0)
    assert gate.due == float("inf")
    ended(gate, 2, 1.1)
    assert gate.due == float("-inf")


def test_plan_is_due_shortly_before_the_expected_end() -> None:
    gate = AsyncGate(window=2, hold_back=True, tuner=FakeTuner())
    for number, seconds in ((1, 0.100), (2, 0.120), (3, 0.110)):
        run(gate, number, float(number), seconds, 1, 1)
    gate.step_sent(step(4, 1, 1, 1), 10.0)
    assert gate.due == pytest.approx(10.0 + 0.100 * (1 - LEAD_SHARE))
    gate.step_sent(step(5, 1), 10.09)
    assert gate.due == float("inf")
    ended(gate, 4, 10.1)
    assert gate.due == pytest.approx(10.1 + 0.100 * (1 - LEAD_SHARE))  # step 5 began when step 4 ended


def test_plan_is_due_at_once_beside_a_short_step() -> None:
    gate = AsyncGate(window=2, hold_back=True, tuner=FakeTuner())
    run(gate, 1, 0.0, LEAD_SECONDS / 2, 1)
    gate.step_sent(step(2, 1), 1.0)
    assert gate.due < 1.0


def test_prefill_is_expected_by_its_tokens_and_a_fill_not_at_all() -> None:
    gate = AsyncGate(window=2, hold_back=True, tuner=FakeTuner())
    run(gate, 1, 0.0, 0.010, 1)
    run(gate, 2, 1.0, 0.400, 1, 399)
    gate.step_sent(step(3, 100), 2.0)
    assert gate.due == pytest.approx(2.0 + 0.100 * (1 - LEAD_SHARE))
    ended(gate, 3, 2.1)
    gate.step_sent(step(4), 3.0)  # a step with fills only
    assert gate.due <= 3.0


def test_late_answer_of_a_former_runner_changes_nothing() -> None:
    tuner = FakeTuner()
    gate = AsyncGate(window=2, hold_back=True, tuner=tuner)
    run(gate, 8, 0.0, 0.1, 1)
    gate.step_sent(step(9, 1), 1.0)
    ended(gate, 7, 1.0, 9.0)
    assert gate.due == pytest.approx(1.0 + 0.1 * (1 - LEAD_SHARE))
    assert tuner.calls == []


@pytest.mark.parametrize("window", [1, 2, 3])
def test_period_is_from_end_to_end_with_any_window(window: int) -> None:
    tuner = FakeTuner()
    gate, sent = AsyncGate(window, hold_back=True, tuner=tuner), 0
    for number in range(1, 6):
        while sent < number - 1 + window:
            sent += 1
            gate.step_sent(step(sent, 1, 1, 40), 0.1 * (number - 1) + 0.01)
        assert gate.due == float("inf"), "the window is full"
        ended(gate, number, 0.1 * number, 0.08)
    assert tuner.calls == [(3, 40, 0.1, 0.08)] * 4, "the first step has no step before it"


def test_period_does_not_count_time_without_work() -> None:
    tuner = FakeTuner()
    gate = AsyncGate(window=2, hold_back=True, tuner=tuner)
    run(gate, 1, 0.0, 0.1, 1)
    gate.nothing_to_plan()
    run(gate, 2, 5.0, 0.1, 1)
    run(gate, 3, 5.15, 0.1, 1)
    assert tuner.calls == [(1, 0, 0.15, 0.1)]
    gate.step_sent(step(4, 1), 5.3)
    gate.nothing_to_plan()  # a step is still in flight, so its period counts
    ended(gate, 4, 5.4)
    assert tuner.calls[1:] == [(1, 0, 0.15, 0.1)]


def test_step_of_fills_alone_is_not_reported_to_the_tuner() -> None:
    tuner = FakeTuner()
    gate = AsyncGate(window=2, hold_back=True, tuner=tuner)
    for number in range(1, 4):
        run(gate, number, float(number), 0.1)
    assert tuner.calls == []


class FakeSockets:
    """The inbox, outbox and clock of a loop; `receive` advances the clock."""

    def __init__(self) -> None:
        self.now = 100.0
        self.arriving: list[tuple[float, Any]] = []
        self.sent: list[tuple[float, Any]] = []

    def receive(self, timeout: float | None) -> list[Any]:
        until = float("inf") if timeout is None else self.now + timeout
        if self.arriving and self.arriving[0][0] <= until:
            at, message = self.arriving.pop(0)
            self.now = max(self.now, at)
            return [message]
        assert timeout is not None, "it would wait for ever"
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


class DrivenLoop:
    """A loop with a simulated runner that takes 0.1 s for a step and reports 0.09 s of them as computed."""

    def __init__(self, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sockets: Any = FakeSockets()
        monkeypatch.setattr(server.time, "monotonic", lambda: self.sockets.now)
        self.capacity = Capacity(
            kv_pages=64, page_size=4, rows=4, max_length=64, max_batched_tokens=32, vocab_size=97, device=device
        )
        endpoints = Endpoints(tokenizer="", scheduler="", runner="", zmq_server="")
        self.loop = Loop(SchedulerConfig(endpoints=endpoints), self.sockets, self.sockets)
        self.ready(epoch=0)
        self.free = 0.0

    def ready(self, epoch: int) -> None:
        self.sockets.arriving.append((self.sockets.now, RunnerReady(epoch=epoch, capacity=self.capacity)))

    def steps(self, count: int, epoch: int = 0) -> list[float]:
        """Runs `count` steps. Returns how long after the runner was free each was sent; negative: before its end."""
        before = len(self.sockets.steps)
        known, late = before, []
        for _ in range(50 * count):
            if len(late) >= count:
                return late
            self.loop.turn()
            for at, sent in self.sockets.steps[known:]:
                known += 1
                late.append(at - max(self.free, 0.0))
                self.free = max(at, self.free) + 0.1
                done = StepDone(epoch=epoch, id=sent.id, tokens=[5], seconds=0.09)
                self.sockets.arriving.append((self.free, done))
        raise AssertionError(f"{len(late)} steps")


def test_loop_plans_ahead_beside_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    driven = DrivenLoop("cuda", monkeypatch)
    driven.sockets.arriving.append((100.0, ask(1)))
    assert driven.steps(10)[1:] == pytest.approx([-0.1] * 9)


def test_loop_on_a_cpu_tries_late_and_early_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    driven = DrivenLoop("cpu", monkeypatch)
    driven.sockets.arriving.append((100.0, ask(1)))
    late = driven.steps(1 + 2 * (BLOCK))
    waited, early = late[1:BLOCK], late[2 + BLOCK :]
    assert waited == pytest.approx([0.0] * len(waited), abs=1e-6)
    assert early == pytest.approx([0.09 * (1 - LEAD_SHARE) - 0.1] * len(early), abs=0.003)


def test_loop_reports_no_idle_time_and_resets_for_a_new_runner(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[FakeTuner] = []

    def make() -> FakeTuner:
        made.append(FakeTuner(pays=False))
        return made[-1]

    monkeypatch.setattr(async_gate, "OverlapTuner", make)
    driven = DrivenLoop("cpu", monkeypatch)
    driven.sockets.arriving.append((100.0, ask(1)))
    driven.steps(50)
    driven.sockets.arriving += [(110.0, ask(2))]  # about 5 seconds after request 1 has ended
    driven.steps(5)
    first = made[-1]
    assert [call[2] for call in first.calls] == [0.1] * 52
    driven.sockets.arriving.clear()
    driven.ready(epoch=1)
    driven.steps(5, epoch=1)
    assert [len(each.calls) for each in made[-2:]] == [52, 3]
