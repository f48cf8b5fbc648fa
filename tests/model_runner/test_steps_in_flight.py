"""Two steps in flight in the runner: launched in order, each reported as it ends, with the tokens of single steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.config.process_configs import Endpoints, RunnerConfig
from engine.messages import Capacity, Chunk, NewRow, Reset, RunnerReady, Sampling, Step, StepDone
from model_runner.lora.adapters_off import AdaptersOff
from model_runner.runner import Runner
from model_runner.server import Server

ENDPOINTS = Endpoints(tokenizer="", scheduler="ipc:///nowhere/s", runner="", zmq_server="")
CHOICES = [
    Sampling(temperature=0.0),
    Sampling(temperature=0.9, seed=5, top_p=0.9),
    Sampling(temperature=0.0, repetition_penalty=1.3, frequency_penalty=0.5),
    Sampling(temperature=0.7, seed=9, min_tokens=4, end_ids=[2, 0], logprobs=3),
    Sampling(temperature=0.9, seed=2, bad_words=[[token, other] for token in range(9) for other in range(9)]),
]


class End(Exception):
    """The script of the test has ended."""


class FakeEvent:
    """A device event; the test sets whether it is done."""

    is_done = False


class FakeRunner:
    """A runner whose steps end as the test's script says. It is also its own inbox and outbox."""

    poll_seconds: float | None = None
    adapters = AdaptersOff()
    capacity = Capacity(kv_pages=1, page_size=1, rows=1, max_length=1, max_batched_tokens=1, vocab_size=1)

    def __init__(self, script: list[Any]) -> None:
        self.script = script
        self.launched: dict[int, Any] = {}
        self.events: list[Any] = []
        self.address = ENDPOINTS.scheduler

    def launch(self, step: Step) -> Any:
        self.events.append(("launch", step.id))
        self.launched[step.id] = type("FakeLaunchedStep", (), {"id": step.id, "done": FakeEvent()})()
        return self.launched[step.id]

    def finish(self, step: Any) -> StepDone:
        self.events.append(("finish", step.id))
        step.done.is_done = True
        return StepDone(epoch=0, id=step.id)

    def advance(self) -> list[Any]:
        return []

    def reset(self) -> None:
        self.events.append("reset")

    def watch(self, descriptor: int) -> None:
        pass

    def receive(self, timeout: float | None) -> Any:
        """Returns the next messages of the script. A number in the script ends the step with that id."""
        assert timeout == 0.0 or not any(not step.done.is_done for step in self.launched.values()), "it would block"
        while True:
            if not self.script:
                raise End
            item = self.script.pop(0)
            if isinstance(item, int):
                self.launched[item].done.is_done = True
                return []
            return item

    def send(self, message: Any) -> None:
        self.events.append((type(message).__name__, getattr(message, "id", None)))


def events(monkeypatch: pytest.MonkeyPatch, script: list[Any]) -> list[Any]:
    runner: Any = FakeRunner(script)
    monkeypatch.setattr(Server, "_connect", lambda *_: runner)
    with pytest.raises(End):
        Server(runner, runner, runner, RunnerConfig(endpoints=ENDPOINTS, model_path="")).loop()
    return runner.events


def test_second_step_is_launched_behind_the_running_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one, two, three = (Step(epoch=0, id=number) for number in (1, 2, 3))
    assert events(monkeypatch, [[one], [two], 1, [three], 2, 3]) == [
        ("launch", 1),
        ("launch", 2),
        ("finish", 1),
        ("StepDone", 1),
        ("launch", 3),
        ("finish", 2),
        ("StepDone", 2),
        ("finish", 3),
        ("StepDone", 3),
    ]


def test_reset_drops_the_old_schedulers_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    found = events(monkeypatch, [[Step(epoch=0, id=1), Step(epoch=0, id=2)], [Reset(0)]])
    assert found[2:] == [("finish", 1), ("finish", 2), "reset", (RunnerReady.__name__, None)]


def test_tokens_do_not_depend_on_the_step_behind(tiny_model: Callable[[str], Path]) -> None:
    fields: dict[str, Any] = {"dtype": "float32", "device": "cpu", "max_running_requests": 4}
    runner = Runner.load(RunnerConfig(endpoints=ENDPOINTS, model_path=str(tiny_model("llama3")), **fields))
    prompts = [[7, 8, 9 + row] for row in range(4)]

    def steps(generation: int) -> list[Step]:
        """Returns a prefill of four rows, then decodes; from step 7 on, row 0 belongs to a new request."""

        def new(row: int, generation: int) -> NewRow:
            history = prompts[row]
            return NewRow(row=row, generation=generation, prompt_length=3, sampling=CHOICES[row], history=history)

        def first(row: int, generation: int) -> Chunk:
            pages = [1 + 2 * row, 2 + 2 * row]
            return Chunk(row=row, generation=generation, start=0, length=3, tokens=prompts[row], pages=pages)

        def decode(row: int, generation: int, start: int) -> Chunk:
            return Chunk(row=row, generation=generation, start=start, length=1)

        rows = range(4)
        made = [
            Step(
                epoch=0, id=1, new_rows=[new(r, generation) for r in rows], chunks=[first(r, generation) for r in rows]
            )
        ]
        made += [
            Step(epoch=0, id=2 + number, chunks=[decode(r, generation, 3 + number) for r in rows])
            for number in range(5)
        ]
        again = generation + 1
        made.append(Step(epoch=0, id=7, new_rows=[new(2, again)], chunks=[decode(0, generation, 8), first(2, again)]))
        made.append(Step(epoch=0, id=8, chunks=[decode(0, generation, 9), decode(2, again, 3)]))
        return made

    alone = [runner.execute(step) for step in steps(1)]
    runner.reset()
    found, launched = [], []
    for step in steps(3):
        launched.append(runner.launch(step))
        if len(launched) > 1:
            found.append(runner.finish(launched.pop(0)))
    found.append(runner.finish(launched.pop(0)))
    assert [done.tokens for done in found] == [done.tokens for done in alone]
    assert [done.logprobs for done in found] == [done.logprobs for done in alone]
    assert len(alone[-1].tokens) == 2
    assert all(done.logprobs for done in alone[:6])
