"""Prefixes are computed once: the scheduler's core with a real runner, then servers, against transformers + PEFT."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from fixtures.models.oracle import Oracle
from fixtures.models.tiny_models import VOCAB, build, make_adapter
from fixtures.scheduling.core_and_runner import Machine
from fixtures.serving.running import RunningServer

from engine import Engine, SamplingParams
from engine.config.process_configs import Endpoints, RunnerConfig
from engine.messages import Generate, LoadAdapter, Sampling, Stopping, UnloadAdapter
from model_runner.runner import Runner
from scheduler.core import Scheduler
from scheduler.state import Bounds

pytestmark = pytest.mark.e2e

PREFIX, NEW_TOKENS = 2048, 4


def ask(number: int, prompt: list[int], adapter_id: int = 0, **fields: str) -> Generate:
    return Generate(
        epoch=0,
        request_id=number,
        prompt=prompt,
        lora=[(adapter_id, 1.0)] if adapter_id else [],
        sampling=Sampling(temperature=0.0),
        stopping=Stopping(NEW_TOKENS),
        **fields,  # type: ignore[arg-type]
    )


@dataclass
class World:
    """A model with a long context, two adapters, and prompts with one prefix where the oracle's margin is clear."""

    model: Path
    paths: dict[str, Path]
    oracle: Oracle
    prompts: list[list[int]]

    def expected(self, prompt: list[int], name: str | None) -> list[int]:
        return self.oracle.greedy(prompt, NEW_TOKENS, name)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    directory = tmp_path_factory.mktemp("long")
    model = build("qwen3", directory / "model", max_position_embeddings=4096)
    paths = {
        "one": make_adapter(model, directory / "one", seed=1, r=4, targets=["q_proj", "v_proj"]),
        "two": make_adapter(model, directory / "two", seed=2, r=16, targets="all-linear"),
    }
    oracle, draw, prompts = Oracle(model, paths), random.Random(11), list[list[int]]()
    prefix = [draw.randrange(6, VOCAB) for _ in range(PREFIX)]
    while len(prompts) < 2:
        prompt = [*prefix, *(draw.randrange(6, VOCAB) for _ in range(20))]
        if all(oracle.is_unambiguous(prompt, NEW_TOKENS, name) for name in (None, "one", "two")):
            prompts.append(prompt)
    return World(model, paths, oracle, prompts)


@pytest.fixture(scope="module")
def runner(world: World) -> Iterator[Runner]:
    endpoints = Endpoints(tokenizer="", scheduler="", runner="", zmq_server="")
    config = RunnerConfig(
        endpoints=endpoints,
        model_path=str(world.model),
        dtype="float32",
        device="cpu",
        enable_lora=True,
        max_lora_rank=16,
        max_running_requests=4,
        max_batched_tokens=512,
    )
    runner = Runner.load(config)
    yield runner
    runner.close()


def machine_of(runner: Runner, world: World, window: int, prefix_cache: bool = True) -> Machine:
    runner.reset()
    machine = Machine(runner, Scheduler(runner.capacity, Bounds(8, prefix_cache=prefix_cache), window))
    machine.send(None)
    for number, path in enumerate(world.paths.values(), start=1):
        machine.send(LoadAdapter(adapter_id=number, path=str(path)))
    return machine


@pytest.mark.parametrize("window", [1, 2])
def test_second_request_computes_only_uncached_tokens(runner: Runner, world: World, window: int) -> None:
    machine = machine_of(runner, world, window)
    first, second = world.prompts
    names = {0: None, 1: "one", 2: "two"}
    for number, (prompt, adapter_id, computed) in enumerate(
        [(first, 1, PREFIX + 20), (second, 1, 20), (second, 2, PREFIX + 20), (first, 0, PREFIX + 20), (first, 1, 4)]
    ):
        assert machine.run(ask(number, prompt, adapter_id)) == computed, number
        assert machine.cached[number] == len(prompt) - computed
        assert machine.tokens[number] == world.expected(prompt, names[adapter_id])
    for adapter_id in names:
        if adapter_id:
            machine.send(UnloadAdapter(adapter_id))


def test_concurrent_requests_compute_their_prefix_once(runner: Runner, world: World) -> None:
    machine = machine_of(runner, world, 2)
    first, second = world.prompts
    asked = {1: (first, "one", 1), 2: (second, "one", 1), 3: (first, "one", 1), 4: (second, "two", 2)}
    computed = machine.run(*(ask(number, prompt, lora) for number, (prompt, _, lora) in asked.items()))
    assert computed < 2 * PREFIX + 4 * 20
    for number, (prompt, name, _) in asked.items():
        assert machine.tokens[number] == world.expected(prompt, name)
    for adapter_id in (1, 2):
        machine.send(UnloadAdapter(adapter_id))


def test_other_tenant_and_disabled_cache_share_nothing(runner: Runner, world: World) -> None:
    prompt = world.prompts[0][-300:]
    machine = machine_of(runner, world, 1)
    computed = [machine.run(ask(n, prompt, 0, cache_salt=tenant)) for n, tenant in enumerate("tut")]
    assert computed == [300, 300, 12]
    machine = machine_of(runner, world, 1, prefix_cache=False)
    assert [machine.run(ask(n, prompt)) for n in range(2)] == [300, 300]
    assert set(machine.cached.values()) == {0}


def test_repointed_name_never_reads_old_pages(world: World) -> None:
    first, second = world.prompts
    flags = ["--model-path", world.model, "--dtype", "float32", "--max-lora-rank", 16, "--max-running-requests", 4]
    flags += ["--lora-paths", f"voice={world.paths['one']}", f"other={world.paths['two']}", "--page-size", 32]

    def native(prompt: list[int], lora: str | None) -> tuple[list[int], int]:
        params = {"max_new_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True}
        status, answer = server.post("/generate", {"input_ids": prompt, "lora_path": lora, "sampling_params": params})
        assert status == 200, answer
        return answer["output_ids"], answer["meta_info"]["cached_tokens"]

    async def point(name: str) -> tuple[list[int], int]:
        """Points `voice` at adapter `name`; returns an embedded engine's tokens and cached tokens for `first`."""
        params = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True)
        async with Engine.connect(server.connect_address) as engine:
            await engine.load_lora_adapter("voice", str(world.paths[name]), load_inplace=True)
            (answer,) = await engine.generate_all([first], params, lora="voice")
            return answer.token_ids, answer.usage.cached_tokens

    with RunningServer(*flags) as server:
        assert native(first, "voice") == (world.expected(first, "one"), 0)
        assert native(second, "voice") == (world.expected(second, "one"), PREFIX)
        assert native(second, "other") == (world.expected(second, "two"), 0)
        assert native(second, None) == (world.expected(second, None), 0)
        body = {"model": "voice", "prompt": first, "max_tokens": NEW_TOKENS, "temperature": 0}
        status, answer = server.post("/v1/completions", body)
        assert (status, answer["usage"]["prompt_tokens_details"]) == (200, {"cached_tokens": PREFIX})
        assert asyncio.run(point("two")) == (world.expected(first, "two"), PREFIX), (
            "equal bytes as `other` share its pages"
        )
        server.wait_stats(lambda stats: stats["host_adapters"] == 1)  # until then the old revision could be used again
        assert asyncio.run(point("one")) == (world.expected(first, "one"), 0), (
            "the pages were freed with their revision"
        )
        stats = server.wait_stats(lambda stats: stats["kv_pages_cached"] >= 3 * PREFIX // 32)
        assert stats["cached_tokens"] == 3 * PREFIX
        assert server.get("/server_info")["capacity"]["page_size"] == 32
