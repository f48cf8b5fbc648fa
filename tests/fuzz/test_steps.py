"""Well-typed nonsense from the scheduler: the runner refuses a step as a whole, or changes only the rows it names."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from fixtures.adapters.mutations import Mutator
from fixtures.models.tiny_models import make_adapter
from fixtures.scheduling.step_driver import finish_transfers, load

from engine.config.process_configs import Endpoints, RunnerConfig
from engine.errors import EngineError
from engine.messages import Chunk, EvictAdapter, Fill, LanePages, LoadAdapter, NewRow, Sampling, Step, UnloadAdapter
from model_runner.runner import Runner

CASES = 10_000
ENDPOINTS = Endpoints(tokenizer="", scheduler="", runner="", zmq_server="")
PROMPT = [3, 5, 7, 11, 13]
ENDS = (Exception,)
"""Exceptions that end a runner: its process logs them and exits, and the scheduler rebuilds its requests."""


@pytest.fixture(scope="module")
def runner(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    """A runner with eight rows, a few pages and one adapter on the host."""
    model = tiny_model("llama3")
    path = make_adapter(model, tmp_path_factory.mktemp("adapter") / "a", r=4, targets=["q_proj", "down_proj"])
    options: dict[str, Any] = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 8, "page_size": 4}
    config = RunnerConfig(
        endpoints=ENDPOINTS, model_path=str(model), dtype="float32", device="cpu", max_running_requests=8,
        context_length=64, max_total_tokens=160, max_batched_tokens=64, **options,
    )  # fmt: skip
    runner = Runner.load(config)
    assert load(runner, LoadAdapter(adapter_id=1, path=str(path))).state == "host"
    yield runner
    runner.close()


class World:
    """Draws and executes random steps for all rows but the last; asserts that they do not change the last row."""

    def __init__(self, runner: Runner, seed: int) -> None:
        self.runner = runner
        self.mutator = Mutator(seed)
        self.draw: random.Random = self.mutator.draw
        capacity = runner.capacity
        self.row = capacity.rows - 1  # the last row and the last pages: a negative index would reach them
        self.pages = [capacity.kv_pages, capacity.kv_pages - 1]
        self.executed = self.refused = 0
        self.rebuild()

    def rebuild(self) -> None:
        """Resets the runner, and runs a prompt in the last row."""
        self.runner.reset()
        self.generation = 0
        chunk = Chunk(row=self.row, generation=0, start=0, length=5, tokens=PROMPT, pages=self.pages)
        done = self.runner.execute(Step(epoch=0, id=1, new_rows=[self._new(self.row)], chunks=[chunk]))
        self.first = done.tokens
        self.kept = self._state()

    def _new(self, row: int) -> NewRow:
        return NewRow(
            row=row, generation=self.generation, prompt_length=5, sampling=Sampling(temperature=0.0, seed=1),
            history=[1, 2] if self.draw.random() < 0.3 else [],
        )  # fmt: skip

    def _state(self) -> list[Any]:
        """Returns everything that the runner holds for the last row."""
        parts = self.runner.parts
        rows, pages = parts.rows, slice(min(self.pages), max(self.pages) + 1)
        layers = map(parts.pool.layer, range(parts.decoder.config.num_layers))
        return [
            *(each[pages].clone() for layer in layers for each in layer),
            rows.tables[self.row].tolist(), int(rows.page_counts[self.row]), int(rows.generations[self.row]),
            int(rows.lanes[self.row]), int(rows.last_tokens_R[self.row]),
        ]  # fmt: skip

    def step(self) -> Step:
        """Draws a valid step for other rows than the last one."""
        capacity, draw = self.runner.capacity, self.draw
        self.generation += 1
        rows = draw.sample(range(capacity.rows - 1), draw.choice([1, 1, 2, 3]))
        free = draw.sample(range(1, capacity.kv_pages - 1), 2 * len(rows))
        chunks = []
        for index, row in enumerate(rows):
            length = draw.randrange(1, 8)
            chunks.append(Chunk(
                row=row, generation=self.generation, start=0, length=length, lane=draw.choice([0, 0, 1]),
                tokens=[draw.randrange(1, 40) for _ in range(length)], pages=free[2 * index : 2 * index + 2],
                samples=draw.random() < 0.8,
            ))  # fmt: skip
        fills, lanes = [], []
        if draw.random() < 0.2:
            pages = {group: [draw.randrange(count)] for group, count in capacity.rank_pages.items()}
            pages = {group: pages[group] for group in ("qkv", "down") if group in pages}
            fills = [Fill(1, pages, draw.random() < 0.7)]
            lanes = [LanePages(1, {group: [(pages[group][0], 0.5)] for group in pages})]
        return Step(
            epoch=0, id=2, fills=fills, lanes=lanes, new_rows=[self._new(row) for row in rows], chunks=chunks
        )  # fmt: skip

    def changed_step(self) -> Step:
        """Draws a valid step and changes one to three places in it."""
        return self.mutator.message(self.step())

    def names_last_row(self, step: Step) -> bool:
        """Returns whether a step names the last row or its pages, and so may change them."""
        rows = {each.row for each in (*step.new_rows, *step.chunks)}
        pages = {page for chunk in step.chunks for page in chunk.pages}
        return self.row in rows or bool(pages & set(self.pages))

    def execute(self, step: Step) -> None:
        """Executes a step, or counts its refusal. The last row must be unchanged unless the step names it."""
        try:
            done = self.runner.execute(step)
            self.runner.advance()
        except ENDS:
            self.refused += 1
            self.rebuild()
            return
        self.executed += 1
        assert len(done.tokens) == sum(chunk.samples for chunk in step.chunks)
        assert all(0 <= token < self.runner.capacity.vocab_size for token in done.tokens)
        if self.names_last_row(step):
            self.rebuild()
            return
        for before, after in zip(self.kept, self._state(), strict=True):
            same = torch.equal(before, after) if isinstance(before, torch.Tensor) else before == after
            assert same, f"{step} changed {before} to {after}"


def test_steps_change_only_the_rows_they_name(runner: Runner) -> None:
    world = World(runner, 31)
    first = world.first
    for _ in range(CASES):
        world.execute(world.changed_step())
    assert world.executed > CASES * 0.05, f"{world.executed} were executed"
    assert world.refused > CASES * 0.2, f"{world.refused} were refused"
    world.rebuild()
    assert world.first == first


@pytest.mark.parametrize(
    "change",
    [
        {"start": -4, "length": 4}, {"start": -1}, {"pages": [-1, 3]}, {"pages": [1 << 20, 3]},
        {"lane": -1}, {"lane": 1 << 20}, {"lane": 2}, {"lane": 3}, {"tokens": [-1, 2, 3, 4]}, {"tokens": [-7, 2, 3, 4]},
        {"tokens": [1 << 40, 2, 3, 4]}, {"tokens": [1, 2, 3]}, {"length": 1 << 40}, {"length": 0}, {"length": -3},
        {"row": -1}, {"row": 8}, {"generation": 5}, {"pages": [1] * 100},
    ],
)  # fmt: skip
def test_chunk_out_of_range_is_refused(runner: Runner, change: dict[str, Any]) -> None:
    """Some of these values are valid indices for Python and tensors, which count negative ones from the end."""
    world = World(runner, 32)
    sound: dict[str, Any] = {
        "row": 0,
        "generation": 1,
        "start": 0,
        "length": 4,
        "tokens": [1, 2, 3, 4],
        "pages": [1, 3],
    }
    world.generation = 1
    step = Step(epoch=0, id=2, new_rows=[world._new(0)], chunks=[Chunk(**(sound | change))])
    with pytest.raises((EngineError, AssertionError, IndexError, RuntimeError, OverflowError, ValueError)):
        runner.execute(step)
    runner.reset()
    runner.execute(Step(epoch=0, id=3, new_rows=[world._new(0)], chunks=[Chunk(**sound)]))


def test_loads_have_one_answer_each(runner: Runner, tmp_path: Path) -> None:
    """Random loads, unloads and evictions: each load has one result, and a valid load after them is served."""
    mutator = Mutator(33)
    sound: list[msgspec.Struct] = [
        LoadAdapter(adapter_id=2, path=str(tmp_path), revision="r", name="a"), UnloadAdapter(2), EvictAdapter(2)
    ]  # fmt: skip
    asked: Counter[int] = Counter()
    answered: Counter[int] = Counter()
    for _ in range(400):
        match mutator.message(mutator.draw.choice(sound)):
            case LoadAdapter() as message if message.adapter_id != 1:
                asked[message.adapter_id] += 1
                state = runner.adapters.load(message)
                answered.update([state.adapter_id] if state else [])
            case UnloadAdapter() as message if message.adapter_id != 1 and message.adapter_id not in asked:
                assert runner.adapters.unload(message.adapter_id).state == "gone"
            case EvictAdapter() as message if message.adapter_id != 1 and message.adapter_id not in asked:
                assert runner.adapters.evict(message.adapter_id).state == "disk"
        answered.update(state.adapter_id for state in runner.advance())
    answered.update(state.adapter_id for state in finish_transfers(runner))
    assert answered.keys() == asked.keys()
    # adapter 1 was loaded by the fixture
    assert load(runner, LoadAdapter(adapter_id=1, path=str(tmp_path))).state == "host"
