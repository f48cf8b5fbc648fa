"""Activated LoRA (aLoRA): the scheduler's core with a real runner; the tokens equal those of PEFT's own `generate`."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures.adapters.activated import LONG, SHORT, Activated
from fixtures.adapters.adapter_zoo import ATTENTION, MLP, ZOO, save
from fixtures.models.oracle import Oracle
from fixtures.models.tiny_models import VOCAB, build, make_adapter
from fixtures.scheduling.core_and_runner import Machine
from fixtures.serving.running import RunningServer

from engine.config.process_configs import Endpoints, RunnerConfig
from engine.messages import Abort, Generate, LoadAdapter, RunnerReady, Sampling, Stopping, UnloadAdapter
from model_runner.runner import Runner
from scheduler.core import Scheduler
from scheduler.state import Bounds

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed"),
    # patterns of fused modules
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match"),
]

N, PAGE = 6, 4
Asked = list[tuple[list[int], str | None, list[int]]]
ACTIVATED = {"short": SHORT, "long": LONG}
NUMBERS = {None: 0, "short": 1, "long": 2, "lora": 3, "dora": 4}


def adapters_of(model: Path, into: Path) -> dict[str, Path]:
    """Saves two activated adapters, a LoRA and a DoRA adapter with PEFT; returns their directories by name."""
    return {
        "short": save(model, into / "short", activated(SHORT, ATTENTION, r=20, rank_pattern={"o_proj": 3}), 1),
        "long": save(model, into / "long", activated(LONG, [*ATTENTION, *MLP], use_rslora=True, lora_bias=True), 2),
        "lora": make_adapter(model, into / "lora", seed=3, r=4, targets="all-linear"),
        "dora": save(model, into / "dora", ZOO["dora"](), 4),
    }


def activated(invocation: list[int], targets: list[str], **options: object) -> object:
    import peft

    fields = {"r": 4, "lora_alpha": 8, **options}
    return peft.LoraConfig(task_type="CAUSAL_LM", target_modules=targets, alora_invocation_tokens=invocation, **fields)


@dataclass
class World:
    """A runner with all adapters, and the oracles that compute the expected tokens."""

    runner: Runner
    paths: dict[str, Path]
    peft: Activated
    oracle: Oracle

    def expected(self, prompt: list[int], name: str | None) -> list[int] | None:
        if name in ACTIVATED:
            return self.peft.greedy(prompt, N, name)
        return self.oracle.greedy(prompt, N, name) if self.oracle.is_unambiguous(prompt, N, name) else None

    def clear(self, name: str | None, draw: Callable[[], list[int]]) -> tuple[list[int], str | None, list[int]]:
        """Draws prompts until the oracle's margin is clear; returns the prompt, its adapter and the expected tokens."""
        while True:
            prompt = draw()
            expected = self.expected(prompt, name)
            if expected is not None:
                return prompt, name, expected

    def machine(self, window: int = 1) -> Machine:
        self.runner.reset()
        machine = Machine(self.runner, Scheduler(self.runner.capacity, Bounds(4), window))
        machine.send(None)
        for name, path in self.paths.items():
            machine.send(LoadAdapter(adapter_id=NUMBERS[name], path=str(path)))
        return machine


def build_world(model: Path, paths: dict[str, Path], backend: str = "torch") -> World:
    config = RunnerConfig(
        endpoints=Endpoints(tokenizer="", scheduler="", runner="", zmq_server=""),
        model_path=str(model),
        dtype="float32",
        device="cpu",
        enable_lora=True,
        lora_backend=backend,
        max_loras=4,
        max_lora_rank=20,
        max_running_requests=16,
        max_total_tokens=4096,
        max_batched_tokens=24,
        page_size=PAGE,
    )
    plain = {name: path for name, path in paths.items() if name not in ACTIVATED}
    first = {name: path for name, path in paths.items() if name in ACTIVATED}
    return World(Runner.load(config), paths, Activated(model, first), Oracle(model, plain))


def served(world: World, asked: Asked, window: int = 1, first: int = 0) -> Machine:
    """Runs all requests concurrently on a new machine, checks the tokens of each, and returns the machine."""
    machine = world.machine(window)
    machine.run(*(ask(first + number, prompt, name) for number, (prompt, name, _) in enumerate(asked)))
    wrong = [name for number, (_, name, expected) in enumerate(asked) if machine.tokens[first + number] != expected]
    assert not wrong
    return machine


def ask(number: int, prompt: list[int], name: str | None, scores: int = -1, **fields: object) -> Generate:
    return Generate(
        epoch=0,
        request_id=number,
        prompt=prompt,
        lora=[(NUMBERS[name], 1.0)] if name else [],
        sampling=Sampling(temperature=0.0, prompt_logprobs=scores),
        stopping=Stopping(N),
        **fields,  # type: ignore[arg-type]
    )


def text(draw: random.Random, length: int) -> list[int]:
    """Draws `length` tokens that contain no invocation."""
    return [draw.randrange(20, VOCAB) for _ in range(length)]


def places(draw: random.Random, invocation: list[int]) -> dict[str, list[int]]:
    """Draws one prompt for each possible position of the invocation."""
    return {
        "start": [*invocation, *text(draw, 9)],
        "in its first page": [*text(draw, 2), *invocation, *text(draw, 3)],
        "at a page's beginning": [*text(draw, 8), *invocation, *text(draw, 6)],
        "at a page's end": [*text(draw, 11), *invocation, *text(draw, 6)],
        "across two steps": [*text(draw, 23), *invocation, *text(draw, 30)],
        "end": [*text(draw, 10), *invocation],
        "alone": list(invocation),
        "absent": text(draw, 13),
        "broken": [*text(draw, 6), *invocation[:-1]],
        "twice": [*text(draw, 5), *invocation, *text(draw, 6), *invocation, *text(draw, 2)],
        "overlapping itself": [*text(draw, 5), *SHORT, *SHORT[1:], *LONG, *invocation[:1]],
    }


@pytest.fixture(scope="module")
def world(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    model = tiny_model("llama3")
    world = build_world(model, adapters_of(model, tmp_path_factory.mktemp("activated")))
    yield world
    world.runner.close()


@pytest.mark.parametrize("window", [1, 2, 3])
def test_invocation_at_every_position_in_a_mixed_batch(world: World, window: int) -> None:
    draw, asked = random.Random(window), Asked()
    for name, invocation in ACTIVATED.items():
        for where in places(draw, invocation):
            asked.append(world.clear(name, lambda at=where, of=invocation: places(draw, of)[at]))  # type: ignore[misc]
    asked += [world.clear(other, lambda: text(draw, 17)) for other in (None, "lora", "dora")]
    draw.shuffle(asked)
    machine = served(world, asked, window)
    machine.run(*(ask(100 + number, prompt, name) for number, (prompt, name, _) in enumerate(asked)))
    assert [machine.tokens[100 + n] for n in range(len(asked))] == [expected for _, _, expected in asked]
    assert sum(machine.cached[100 + n] for n in range(len(asked))) > 0
    lanes = {len({chunk.lane for chunk in chunks}) for chunks in machine.chunks}
    assert max(lanes) >= 4


def test_generated_invocation_does_not_activate(world: World) -> None:
    """Only the prompt is searched for the invocation: PEFT on the prompt and the generated tokens would activate it."""
    prompt = text(random.Random(4), 12)
    machine = world.machine()
    request = ask(1, prompt, "short")
    replayed = Generate(**{f: getattr(request, f) for f in request.__struct_fields__} | {"generated": [40, *SHORT, 41]})
    machine.run(replayed)
    assert all(chunk.lane == 0 for chunks in machine.chunks for chunk in chunks)
    best = world.oracle.logits([*prompt, 40, *SHORT, 41])[-1].argmax()
    assert machine.tokens[1] == [int(best)]


def test_prompt_logprobs_change_at_the_invocation(world: World) -> None:
    prompt = [*text(random.Random(6), 21), *SHORT, *text(random.Random(7), 12)]
    machine = world.machine()
    machine.run(ask(1, prompt, "short"), ask(2, prompt, "short", scores=0))
    rows = world.peft.logprobs(prompt, "short")
    expected = [float(rows[at, token]) for at, token in enumerate(prompt[1:])]
    torch.testing.assert_close(
        torch.tensor([s.logprob for s in machine.scores[2]]), torch.tensor(expected), atol=1e-4, rtol=1e-4
    )
    base = torch.log_softmax(world.oracle.logits(prompt), dim=-1)
    torch.testing.assert_close(rows[:21], base[:21], atol=1e-4, rtol=1e-4)
    assert (rows[21:] - base[21:]).abs().max() > 0.1


def test_prefix_before_the_invocation_is_shared_with_base(world: World) -> None:
    """Only the pages (of 4 tokens) that are full before the invocation are shared with the base model."""
    draw = random.Random(8)
    prefix = text(draw, 298)  # 74 full pages and half a page
    tails = {None: text(draw, 9), "short": [*SHORT, *text(draw, 5)], "long": [*LONG, *text(draw, 2)]}
    for order in ([None, "short", "long"], ["long", None, "short"]):
        machine = world.machine()
        for number, name in enumerate(order):
            prompt = [*prefix, *tails[name]]
            computed = machine.run(ask(number, prompt, name))
            assert computed == (len(prompt) - 296 if number else len(prompt)), (order, name)
            assert machine.cached[number] == (296 if number else 0)
            expected = world.expected(prompt, name)
            assert expected is None or machine.tokens[number] == expected
        prompt = [*prefix, *tails["short"], *text(draw, 4)]
        assert machine.run(ask(9, prompt, "short")) == len(prompt) - 304, (
            "it reads its own pages, also after the invocation"
        )
        assert machine.run(ask(10, [*prefix, *tails["short"]], None)) == 10, (
            "the base shares no page after the invocation"
        )
        assert machine.run(ask(11, prompt, "lora")) == len(prompt), (
            "a LoRA that acts from the first token on shares none"
        )
        assert machine.run(ask(12, [*prefix, *SHORT, *text(draw, 4)], "short", cache_salt="tenant")) == 305


def test_mix_with_an_activated_adapter_is_refused(world: World) -> None:
    machine = world.machine()
    assert machine.states[1].invocation == SHORT
    assert machine.states[3].invocation == []
    request = ask(1, text(random.Random(1), 5), "short")
    machine.send(
        Generate(**{f: getattr(request, f) for f in request.__struct_fields__} | {"lora": [(1, 0.5), (3, 0.5)]})
    )
    assert "cannot be mixed" in machine.errors[1]


@pytest.mark.parametrize("after", [1, 2, 4])
def test_tokens_survive_a_new_runner_and_an_unload(world: World, after: int) -> None:
    """The runner is replaced while it computes the base's part or the adapter's part, after the adapter is unloaded."""
    draw = random.Random(9)
    prompt, _, expected = world.clear("short", lambda: [*text(draw, 30), *SHORT, *text(draw, 20)])
    machine = world.machine()
    machine.send(ask(1, prompt, "short"))
    machine.send(ask(2, prompt, "short"))
    machine.send(UnloadAdapter(NUMBERS["short"]))
    for _ in range(after):
        step = machine.core.plan(0.0)
        assert step is not None
        machine.steps.append(step)
        machine.execute()
    machine.send(Abort(0, 2))
    world.runner.reset()
    for adapter_id in NUMBERS.values():
        if adapter_id:
            world.runner.adapters.unload(adapter_id)
    machine.send(RunnerReady(epoch=0, capacity=world.runner.capacity))
    machine.run()
    assert machine.tokens[1] == expected
    assert machine.states[NUMBERS["short"]].state == "gone"


def test_server_reports_tokens_cached_across_adapters(tmp_path: Path) -> None:
    """A prefix of 2,048 tokens is computed once; later requests compute only what follows it."""
    model = build("qwen3", tmp_path / "model", max_position_embeddings=4096)
    names = {"short": SHORT, "other": [*SHORT, 7]}
    paths = {
        name: save(model, tmp_path / name, activated(tokens, ATTENTION), seed)
        for seed, (name, tokens) in enumerate(names.items())
    }
    oracle, draw = Activated(model, paths), random.Random(12)
    flags = ["--model-path", model, "--dtype", "float32", "--max-running-requests", 4]
    flags += ["--lora-paths", *(f"{name}={path}" for name, path in paths.items())]

    def native(prompt: list[int], lora: object) -> tuple[int, dict[str, Any]]:
        params = {"max_new_tokens": 2, "temperature": 0, "ignore_eos": True}
        return server.post("/generate", {"input_ids": prompt, "lora_path": lora, "sampling_params": params})

    def cached(prompt: list[int], lora: str | None) -> int:
        status, answer = native(prompt, lora)
        assert status == 200, answer
        expected = oracle.greedy(prompt, 2, lora) if lora else None
        assert expected is None or answer["output_ids"] == expected
        return int(answer["meta_info"]["cached_tokens"])

    with RunningServer(*flags) as server:
        one, two = (text(draw, 2048) for _ in range(2))
        assert [cached([*one, 40], None), cached([*one, *SHORT, 41], "short")] == [0, 2048]
        assert [cached([*two, *SHORT, 42], "short"), cached([*two, 43, 44], None)] == [0, 2048]
        assert cached([*two, *names["other"]], "other") == 2048
        status, answer = native(one[:9], {"short": 0.5, "other": 0.5})
        assert status == 400
        assert "do not mix it" in str(answer)
        cards = {card["id"]: card for card in server.get("/v1/models")["data"]}
        assert {name: cards[name]["alora_invocation_tokens"] for name in names} == names


FAMILIES = (
    *("llama2", "llama-bias", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "granite", "smollm3", "olmo2"),
    *("mixtral", "qwen3-moe"),
)


@pytest.mark.parametrize("family", FAMILIES)
def test_activated_tokens_in_every_family(family: str, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    model = tiny_model(family)
    world = build_world(model, {"short": save(model, tmp_path, activated(SHORT, ATTENTION), 1)})
    draw = random.Random(3)
    asked = [world.clear("short", lambda: [*text(draw, 13), *SHORT, *text(draw, 11)]) for _ in range(2)]
    asked.append(world.clear(None, lambda: [*asked[0][0][:16], *text(draw, 3)]))
    served(world, asked, window=2)
    moved = world.peft.logprobs(asked[0][0], "short") - torch.log_softmax(world.oracle.logits(asked[0][0]), dim=-1)
    assert moved[:13].abs().max() < 1e-4
    assert moved[13:].abs().max() > 0.1
    world.runner.close()


@pytest.mark.parametrize("backend", ["triton", "csgmv"])
def test_activated_tokens_with_the_kernel_backends(
    backend: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    model = tiny_model("qwen2")
    paths = {"short": save(model, tmp_path / "short", activated(SHORT, ATTENTION), 1)}
    world = build_world(model, paths | {"dora": save(model, tmp_path / "dora", ZOO["dora"](), 4)}, backend)
    draw = random.Random(5)
    names = ("short", None, "dora")
    served(world, [world.clear(name, lambda: [*text(draw, 5), *SHORT, *text(draw, 2)]) for name in names])
    world.runner.close()
