"""Captured steps against eager ones. On a CPU everything but the capture itself is tested; that needs a GPU."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures.adapters.adapter_zoo import ZOO, save
from fixtures.models.oracle import Oracle
from fixtures.models.tiny_models import VOCAB, make_adapter
from fixtures.scheduling.step_driver import Ask, Driver
from fixtures.scheduling.step_driver import load as bring

from engine.config.process_configs import AdapterSource, Endpoints, RunnerConfig
from engine.messages import AdapterState, LoadAdapter, Sampling
from model_runner.build import memory_plan
from model_runner.compute.attention import base as attention
from model_runner.cuda_graphs.primitives import EagerCapture, GraphCapture, Work
from model_runner.lora.backends import base as lora_backends
from model_runner.platform.compilations import CompilationCounter
from model_runner.runner import Runner
from model_runner.warmup import warm_up

ENDPOINTS = Endpoints(tokenizer="", scheduler="", runner="", zmq_server="")
ADAPTERS: list[dict[str, Any]] = [
    {"r": 8, "targets": ["q_proj", "v_proj", "down_proj"]},
    {"r": 20, "targets": "all-linear"},
    {"r": 16, "targets": ["o_proj", "gate_proj"]},
]


class CountingCapture(GraphCapture):
    """Captures as `inner` does, and counts captures and replays."""

    def __init__(self, inner: GraphCapture) -> None:
        self.inner = inner
        self.captured = self.replayed = 0

    def capture(self, work: Work) -> Work:
        replay = self.inner.capture(work)
        self.captured += 1

        def counted() -> None:
            self.replayed += 1
            replay()

        return counted


@pytest.fixture(scope="module")
def model(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("mistral")  # a sliding window, and heads of another size than hidden / heads


@pytest.fixture(scope="module")
def sources(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[AdapterSource]:
    root = tmp_path_factory.mktemp("adapters")
    made = [make_adapter(model, root / str(i), seed=i, **options) for i, options in enumerate(ADAPTERS, 1)]
    made.append(save(model, root / "norms", ZOO["all norms"](), seed=4))
    return [AdapterSource(adapter_id=i, name=f"a{i}", path=str(path), root=str(path)) for i, path in enumerate(made, 1)]


@pytest.fixture(scope="module")
def oracle(model: Path, sources: list[AdapterSource]) -> Oracle:
    return Oracle(model, {source.name: source.root for source in sources})


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> CountingCapture:
    """Lets the runners of a test capture on a CPU, with backends that have static metadata."""
    capture = CountingCapture(EagerCapture())
    monkeypatch.setattr("model_runner.build.assembly.capture_for", lambda device: capture)
    monkeypatch.setitem(attention.BACKENDS, "static", "fixtures.models.static_backends:StaticAttention")
    monkeypatch.setitem(lora_backends.BACKENDS, "static", "fixtures.models.static_backends:StaticLora")
    return capture


def load(model: Path, sources: list[AdapterSource], **options: Any) -> Runner:
    fields: dict[str, Any] = {
        "dtype": "float32",
        "device": "cpu",
        "enable_lora": bool(sources),
        "max_running_requests": 24,
        "max_loras": 2,
        "attention_backend": "static",
        "lora_backend": "static",
        "cuda_graph_max_rows": 16,
    }
    return Runner.load(
        RunnerConfig(endpoints=ENDPOINTS, model_path=str(model), adapters=sources, **{**fields, **options})
    )


def states(runner: Runner, sources: list[AdapterSource]) -> dict[int, AdapterState]:
    return {s.adapter_id: bring(runner, LoadAdapter(adapter_id=s.adapter_id, path=s.root)) for s in sources}


def asks(
    oracle: Oracle, count: int, adapter_ids: list[int], seed: int, tokens: int = 12, longest: int = 40
) -> list[Ask]:
    draw, found = random.Random(seed), list[Ask]()
    while len(found) < count:
        prompt = [draw.randrange(VOCAB) for _ in range(draw.randint(1, longest))]
        adapter_id = adapter_ids[len(found) % len(adapter_ids)]
        if oracle.is_unambiguous(prompt, tokens, f"a{adapter_id}" if adapter_id else None):
            found.append(Ask(prompt, tokens, adapter_id))
    return found


def expected(oracle: Oracle, requests: list[Ask]) -> list[list[int]]:
    return [oracle.greedy(a.prompt, a.count, f"a{a.adapter_id}" if a.adapter_id else None) for a in requests]


def test_every_size_is_captured_with_and_without_lora(
    counting: CountingCapture, model: Path, sources: list[AdapterSource]
) -> None:
    runner = load(model, sources)
    assert runner.graph_sizes == [1, 2, 4, 8, 16]
    assert counting.captured == 2 * 5
    assert load(model, [], cuda_graph_max_rows=3).graph_sizes == [1, 2, 3]
    assert counting.captured == 2 * 5 + 3
    assert load(model, sources, cuda_graphs=False).graph_sizes == []
    torch_too = load(model, sources, lora_backend="torch")  # has no static metadata: a warning, and eager steps
    assert torch_too.graph_sizes == []


def test_replays_give_the_oracles_tokens_for_any_lanes(
    counting: CountingCapture, model: Path, sources: list[AdapterSource], oracle: Oracle
) -> None:
    runner = load(model, sources)
    driver = Driver(runner, states(runner, sources))
    # each batch needs at most two lanes
    for number, adapter_ids in enumerate([[1, 0, 2], [0], [3, 4], [2, 1], [0, 4], [3, 0, 1]]):
        requests = asks(oracle, 3 + 2 * number, adapter_ids, seed=number)
        before = counting.replayed
        assert driver.serve(requests, longest_chunk=50) == expected(oracle, requests)
        assert counting.replayed > before
    runner.close()


def test_prefills_and_wide_steps_run_eagerly(counting: CountingCapture, model: Path, oracle: Oracle) -> None:
    runner = load(model, [], cuda_graph_max_rows=2)
    requests = asks(oracle, 6, [0], seed=8, tokens=4)
    driver = Driver(runner)
    assert driver.serve(requests) == expected(oracle, requests)
    assert counting.replayed < driver.step_id
    few = asks(oracle, 2, [0], seed=9, tokens=30)  # long enough for several pages; some steps leave a row out
    before = counting.replayed
    assert driver.serve(few) == expected(oracle, few)
    assert counting.replayed > before + 20


@pytest.mark.parametrize("lora_backend", ["triton", "csgmv"])
def test_replays_of_the_triton_kernels_give_the_right_tokens(
    counting: CountingCapture,
    model: Path,
    sources: list[AdapterSource],
    oracle: Oracle,
    lora_backend: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Runs few steps, because triton's interpreter is slow: one size, and rows that join late or are left out."""
    monkeypatch.setattr(memory_plan, "graph_sizes", lambda rows, asked: [4])
    chosen = {"attention_backend": "triton", "lora_backend": lora_backend, "max_running_requests": 4}
    runner = load(model, sources, **chosen, context_length=64)
    driver = Driver(runner, states(runner, sources), seed=2)
    for number, adapter_ids in enumerate([[2, 0], [1, 3]]):
        requests = asks(oracle, 3, adapter_ids, seed=30 + number, tokens=2, longest=5)
        assert driver.serve(requests, longest_chunk=50) == expected(oracle, requests)
    assert counting.replayed > 1
    runner.close()


def test_draws_and_logprobs_are_those_of_eager_steps(
    counting: CountingCapture, model: Path, sources: list[AdapterSource]
) -> None:
    samplings = [
        Sampling(temperature=0.9, seed=3),
        Sampling(temperature=0.8, seed=4, top_p=0.9, logprobs=2),
        Sampling(temperature=0.0, repetition_penalty=1.3, frequency_penalty=0.3),
        Sampling(temperature=0.0, prompt_logprobs=1, logprobs=0),
    ]
    found = []
    for cuda_graphs in (True, False):
        runner = load(model, sources, cuda_graphs=cuda_graphs)
        driver = Driver(runner, states(runner, sources), seed=5)
        requests = [Ask([7, 8, 9 + n], 10, [0, 1, 2][n % 3], sampling=samplings[n % 4]) for n in range(9)]
        tokens = driver.serve(requests)
        chosen = [entry.token_id for ask in requests for entry in (*ask.logprobs, *ask.prompt_logprobs)]
        values = [entry.logprob for ask in requests for entry in (*ask.logprobs, *ask.prompt_logprobs)]
        found.append((tokens, chosen, values))
        runner.close()
    (tokens, chosen, values), (eager_tokens, eager_chosen, eager_values) = found
    assert (tokens, chosen) == (eager_tokens, eager_chosen)
    assert values == pytest.approx(eager_values, abs=1e-4)


def test_warm_up_runs_every_shape_and_leaves_no_state(
    counting: CountingCapture, model: Path, sources: list[AdapterSource], oracle: Oracle
) -> None:
    runner = load(model, sources, max_batched_tokens=64, context_length=120)
    pages = runner.adapters.pages
    assert pages is not None
    seen: list[tuple[int, int, int]] = []
    launch = runner.launch

    def recording(step: Any) -> Any:
        lanes = {chunk.lane for chunk in step.chunks}
        longest = max((len(held) for lane in pages.lanes.values() for held in lane.values()), default=0)
        seen.append((sum(chunk.length for chunk in step.chunks), len(lanes - {0}), longest if lanes - {0} else 0))
        return launch(step)

    runner.launch = recording  # type: ignore[method-assign]
    warm_up(runner)
    runner.launch = launch  # type: ignore[method-assign]
    assert {tokens for tokens, lanes, _ in seen if lanes == 0} >= {1, 2, 4, 8, 16, 24, 32, 64}
    assert {(lanes, longest) for _, lanes, longest in seen} >= {(0, 0), (1, 1), (2, 1), (2, 4)}
    assert counting.replayed > 0
    assert not pages.lanes
    assert not any(pool.units_PS.any() for pool in pages.pools.values())
    driver = Driver(runner, states(runner, sources))
    requests = asks(oracle, 5, [0, 1, 2], seed=21)
    assert driver.serve(requests) == expected(oracle, requests)
    runner.close()


@pytest.fixture
def on_gpu(model: Path, sources: list[AdapterSource]) -> Iterator[Callable[..., Runner]]:
    """`on_gpu(**options)` loads a runner with the GPU's own backends."""
    made: list[Runner] = []

    def begin(**options: Any) -> Runner:
        own = {"device": "cuda", "attention_backend": "auto", "lora_backend": "auto"}
        made.append(load(model, sources, **{**own, **options}))
        return made[-1]

    yield begin
    for runner in made:
        runner.close()


@pytest.mark.gpu
def test_graphs_give_the_tokens_of_eager_steps_on_a_gpu(
    on_gpu: Callable[..., Runner], sources: list[AdapterSource], oracle: Oracle
) -> None:
    found = []
    for cuda_graphs in (True, False):
        runner = on_gpu(cuda_graphs=cuda_graphs)
        assert bool(runner.graph_sizes) is cuda_graphs
        driver = Driver(runner, states(runner, sources))
        tokens = []
        for number, adapter_ids in enumerate([[1, 0, 2], [0], [3, 4], [2, 1], [0, 4], [3, 0, 1]]):
            requests = asks(oracle, 9, adapter_ids, seed=number)
            tokens.append(driver.serve(requests, longest_chunk=50))
            assert tokens[-1] == expected(oracle, requests)
        found.append(tokens)
    assert found[0] == found[1]


@pytest.mark.gpu
def test_no_kernel_is_compiled_after_the_warm_up(
    on_gpu: Callable[..., Runner], sources: list[AdapterSource], oracle: Oracle
) -> None:
    counter = CompilationCounter().install()
    runner = on_gpu()
    warm_up(runner)
    before = counter.count
    assert before > 0
    driver = Driver(runner, states(runner, sources))
    for number, adapter_ids in enumerate([[1, 0, 2], [0], [3, 2]]):
        driver.serve(asks(oracle, 11, adapter_ids, seed=number), longest_chunk=50)
    assert counter.count == before


@pytest.mark.gpu
@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_launch_never_waits_for_the_device(
    on_gpu: Callable[..., Runner], sources: list[AdapterSource], cuda_graphs: bool
) -> None:
    runner = on_gpu(cuda_graphs=cuda_graphs)
    warm_up(runner)
    driver = Driver(runner, states(runner, sources))
    launch = runner.launch

    def strict(step: Any) -> Any:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return launch(step)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    runner.launch = strict  # type: ignore[method-assign]
    samplings = [
        Sampling(temperature=0.9, seed=3),
        Sampling(temperature=0.8, seed=4, top_p=0.9, top_k=9, min_p=0.01, logprobs=2),
        Sampling(temperature=0.0, repetition_penalty=1.3, min_tokens=3, end_ids=[2], logit_bias=[(5, 1.0)]),
        Sampling(temperature=0.0, prompt_logprobs=1, logprobs=0),
    ]
    tokens = driver.serve([Ask([7, 8, 9 + n], 10, [0, 1, 2][n % 3], sampling=samplings[n % 4]) for n in range(9)])
    assert all(len(each) == 10 for each in tokens)
