"""The runner with steps made by the test, against transformers + PEFT in float32: rows, lanes, chunks and pages."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from fixtures.models.oracle import Oracle
from fixtures.models.tiny_models import VOCAB, make_adapter
from fixtures.scheduling.step_driver import GREEDY, Ask, Driver
from fixtures.scheduling.step_driver import load as bring
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config.process_configs import AdapterSource, Endpoints, RunnerConfig
from engine.errors import AdapterError, ConfigError, InternalError
from engine.messages import AdapterState, Chunk, Fill, LoadAdapter, NewRow, Sampling
from model_runner.runner import Runner

ENDPOINTS = Endpoints(tokenizer="", scheduler="", runner="", zmq_server="")
ADAPTERS: list[dict[str, Any]] = [
    {"r": 8, "alpha": 16},
    {"r": 1, "alpha": 4, "targets": ["q_proj", "v_proj"]},
    {"r": 20, "alpha": 20, "targets": ["down_proj", "gate_proj"]},
    {"r": 16, "alpha": 8, "targets": ["o_proj"], "rslora": True},
    {"r": 5, "alpha": 10, "targets": ["k_proj", "up_proj"], "layers_to_transform": [1, 2]},
    {"r": 40, "alpha": 40, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"up_proj": 7.0}},
]


@pytest.fixture(scope="module")
def model(tiny_model: Callable[[str], Path]) -> Path:
    """The base model's directory."""
    return tiny_model("llama3")


@pytest.fixture(scope="module")
def sources(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[AdapterSource]:
    """Six adapters, ids 1 to 6, of different ranks and targets."""
    root = tmp_path_factory.mktemp("adapters")
    made = [make_adapter(model, root / str(i), seed=i, **options) for i, options in enumerate(ADAPTERS, 1)]
    return [AdapterSource(adapter_id=i, name=f"a{i}", path=str(path), root=str(path)) for i, path in enumerate(made, 1)]


@pytest.fixture(scope="module")
def oracle(model: Path, sources: list[AdapterSource]) -> Oracle:
    """Transformers + PEFT with the same model and adapters."""
    return Oracle(model, {source.name: source.root for source in sources})


def load(model: Path, sources: list[AdapterSource], **options: Any) -> Runner:
    options = {"enable_lora": bool(sources), "dtype": "float32", "device": "cpu", "max_running_requests": 24, **options}
    return Runner.load(RunnerConfig(endpoints=ENDPOINTS, model_path=str(model), adapters=sources, **options))


@pytest.fixture(scope="module")
def runner(model: Path, sources: list[AdapterSource]) -> Iterator[Runner]:
    """One runner for all tests that leave nothing behind except rows of older generations."""
    runner = load(model, sources)
    yield runner
    runner.close()


@pytest.fixture
def driver(runner: Runner, sources: list[AdapterSource]) -> Driver:
    """A driver of the shared runner, which is reset."""
    runner.reset()
    return Driver(runner, host_states(runner, sources))


def host_states(runner: Runner, sources: list[AdapterSource]) -> dict[int, AdapterState]:
    return {s.adapter_id: bring(runner, LoadAdapter(adapter_id=s.adapter_id, path=s.root)) for s in sources}


def asks(oracle: Oracle, count: int, adapter_ids: list[int], seed: int, tokens: int = 8) -> list[Ask]:
    """Returns random requests over these adapters whose greedy tokens are unambiguous."""
    draw, found = random.Random(seed), list[Ask]()
    while len(found) < count:
        prompt = [draw.randrange(VOCAB) for _ in range(draw.randint(1, 40))]
        adapter_id = adapter_ids[len(found) % len(adapter_ids)]
        if oracle.is_unambiguous(prompt, tokens, name(adapter_id)):
            found.append(Ask(prompt, tokens, adapter_id))
    return found


def name(adapter_id: int) -> str | None:
    return f"a{adapter_id}" if adapter_id else None


def expected(oracle: Oracle, requests: list[Ask]) -> list[list[int]]:
    return [oracle.greedy(ask.prompt, ask.count, name(ask.adapter_id)) for ask in requests]


def test_base_and_six_adapters_share_a_batch_of_24(driver: Driver, oracle: Oracle) -> None:
    requests = asks(oracle, 24, [0, 1, 2, 3, 4, 5, 6], seed=1)
    assert driver.serve(requests) == expected(oracle, requests)
    assert len({tuple(tokens) for tokens in expected(oracle, requests)}) > 20


def test_rows_lanes_and_pages_are_reused(driver: Driver, oracle: Oracle) -> None:
    for seed in range(3):
        requests = asks(oracle, 8, [seed + 1, 0, seed + 4], seed=10 + seed, tokens=5)
        assert driver.serve(requests, longest_chunk=50) == expected(oracle, requests)


def test_lanes_may_be_fewer_than_adapters(model: Path, sources: list[AdapterSource], oracle: Oracle) -> None:
    small = load(model, sources, max_loras=2)
    driver = Driver(small, host_states(small, sources))
    for pair in ([1, 6], [2, 3], [5, 4], [6, 2]):
        requests = asks(oracle, 4, [*pair, 0], seed=sum(pair), tokens=4)
        assert driver.serve(requests) == expected(oracle, requests)


def test_base_only_step_plans_no_lora(driver: Driver, oracle: Oracle, monkeypatch: pytest.MonkeyPatch) -> None:
    def plan(*_: object) -> None:
        raise AssertionError("planned")

    monkeypatch.setattr("model_runner.lora.backends.torch_backend.TorchLora.plan", plan)
    requests = asks(oracle, 2, [0], seed=9, tokens=3)
    assert driver.serve(requests) == expected(oracle, requests)
    with pytest.raises(AssertionError, match="planned"):
        driver.serve(asks(oracle, 1, [2], seed=9, tokens=1))


def test_runner_without_lora(model: Path, oracle: Oracle) -> None:
    plain = load(model, [], max_loras=0)
    requests = asks(oracle, 5, [0], seed=3)
    assert Driver(plain).serve(requests) == expected(oracle, requests)
    assert (plain.capacity.max_loras, plain.capacity.rank_pages, plain.capacity.lora_bytes) == (0, {}, 0)
    refused = bring(plain, LoadAdapter(adapter_id=1, path="/nowhere"))
    assert (refused.state, "--enable-lora" in (refused.error or "")) == ("failed", True)


def test_seeded_draws_do_not_depend_on_the_batch(driver: Driver) -> None:
    sampling = [
        Sampling(temperature=0.8, seed=2**64 - 3),
        Sampling(temperature=1.2, top_p=0.9, top_k=50, seed=7),
        Sampling(temperature=1.0, min_p=0.05, repetition_penalty=1.3, frequency_penalty=0.2, seed=8),
        Sampling(temperature=0.7, presence_penalty=1.0, seed=9, min_tokens=5, end_ids=[0, 2]),
    ]
    draw = random.Random(5)
    prompts = [[draw.randrange(VOCAB) for _ in range(draw.randint(3, 30))] for _ in range(8)]

    def ask(index: int) -> Ask:
        return Ask(prompts[index], 10, index % 4, msgspec.structs.replace(sampling[index % 4], logprobs=index % 3))

    together = driver.serve([ask(index) for index in range(8)])
    for index in range(8):
        assert driver.serve([ask(index)], longest_chunk=100) == [together[index]]


@pytest.fixture(scope="module")
def alone(runner: Runner, sources: list[AdapterSource], oracle: Oracle) -> list[tuple[Ask, list[int]]]:
    """Twelve requests, unambiguous greedy ones and seeded ones, each with its tokens when it runs alone."""
    runner.reset()
    driver = Driver(runner, host_states(runner, sources))
    greedy = asks(oracle, 7, [0, 1, 2, 3, 4, 5, 6], seed=21, tokens=6)
    seeded = [
        Ask(ask.prompt, ask.count, ask.adapter_id, Sampling(temperature=0.9, top_p=0.95, seed=number))
        for number, ask in enumerate(asks(oracle, 5, [6, 0, 4, 2, 1], seed=22, tokens=6))
    ]
    return [(ask, driver.serve([_fresh(ask)])[0]) for ask in [*greedy, *seeded]]


def _fresh(ask: Ask) -> Ask:
    """Returns the same request, not started."""
    return Ask(ask.prompt, ask.count, ask.adapter_id, ask.sampling)


@settings(max_examples=25)
@given(data=st.data())
def test_tokens_do_not_depend_on_batch_or_chunks(
    data: st.DataObject, runner: Runner, sources: list[AdapterSource], alone: list[tuple[Ask, list[int]]]
) -> None:
    company = data.draw(st.lists(st.sampled_from(range(len(alone))), min_size=1, max_size=20))
    chunk = data.draw(st.integers(1, 45))
    runner.reset()
    driver = Driver(runner, host_states(runner, sources), seed=data.draw(st.integers(0, 99)))
    tokens = driver.serve([_fresh(alone[number][0]) for number in company], longest_chunk=chunk)
    assert tokens == [alone[number][1] for number in company]


def test_logprobs_and_prompt_logprobs_equal_the_oracle(
    driver: Driver, oracle: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("model_runner.step_forward.SCORED_ELEMENTS", 3 * VOCAB)
    sampling = msgspec.structs.replace(GREEDY, logprobs=2, prompt_logprobs=3)
    requests = asks(oracle, 4, [0, 2, 6], seed=4, tokens=3)
    for ask in requests:
        ask.sampling = sampling
    driver.serve([*requests, Ask([5, 6, 7], 4)])
    for ask in requests:
        raw = oracle.logprobs([*ask.prompt, *ask.tokens], name(ask.adapter_id))
        entries = [*ask.prompt_logprobs, *ask.logprobs]
        assert [entry.token_id for entry in entries] == [*ask.prompt[1:], *ask.tokens]
        for position, entry in enumerate(entries):
            assert entry.logprob == pytest.approx(float(raw[position, entry.token_id]), abs=2e-4)
            width = 3 if position < len(ask.prompt) - 1 else 2
            best = raw[position].topk(width)
            assert [value for _, value in entry.top] == pytest.approx(best.values.tolist(), abs=2e-4)


def test_step_for_another_generation_is_an_error(driver: Driver) -> None:
    driver.step(new_rows=[NewRow(row=0, generation=1, prompt_length=2, sampling=GREEDY)])
    first = Chunk(row=0, generation=1, start=0, length=2, tokens=[5, 6], pages=[1])
    driver.step(chunks=[first])
    driver.step(new_rows=[NewRow(row=0, generation=2, prompt_length=2, sampling=GREEDY)])
    for bad in (
        Chunk(row=0, generation=1, start=2, length=1),
        Chunk(row=0, generation=2, start=0, length=3, tokens=[5, 6], pages=[1]),
        Chunk(row=0, generation=2, start=0, length=2, tokens=[5, 6], pages=[1], samples=False, scores=True),
        Chunk(row=0, generation=2, start=0, length=2, pages=[1]),
    ):
        with pytest.raises(InternalError):
            driver.step(chunks=[bad])
    with pytest.raises(InternalError, match="adapter 99"):
        driver.step(fills=[Fill(99, {})])


def test_broken_adapter_fails_alone(driver: Driver, oracle: Oracle, model: Path, tmp_path: Path) -> None:
    runner = driver.runner
    late = make_adapter(model, tmp_path / "late", r=4, seed=50)
    state = bring(runner, LoadAdapter(adapter_id=20, path=str(late)))
    assert (state.state, state.lora_rank, state.footprint.pages) == (
        "host",
        4,
        {"qkv": 1, "o": 1, "gate_up": 1, "down": 1},
    )
    again = bring(runner, LoadAdapter(adapter_id=20, path=str(late)))
    assert again == msgspec.structs.replace(state, seconds=0.0)
    assert state.seconds > 0
    for adapter_id, path in ((21, tmp_path / "nothing"), (22, make_adapter(model, tmp_path / "wide", r=300))):
        broken = bring(runner, LoadAdapter(adapter_id=adapter_id, path=str(path)))
        assert broken.state == "failed"
        assert path.name in (broken.error or "")
    assert runner.adapters.unload(20).state == "gone"
    with pytest.raises(InternalError):
        driver.step(fills=[Fill(20, {"qkv": [0], "o": [0], "gate_up": [0], "down": [0]})])
    requests = asks(oracle, 2, [6, 0], seed=6, tokens=3)
    assert driver.serve(requests) == expected(oracle, requests)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_stays_close_to_the_oracle(
    model: Path, sources: list[AdapterSource], oracle: Oracle, dtype: str
) -> None:
    half = load(model, sources[:1], dtype=dtype)
    assert half.capacity.dtype == dtype
    draw, sampling = random.Random(1), msgspec.structs.replace(GREEDY, prompt_logprobs=0)
    requests = [Ask([draw.randrange(VOCAB) for _ in range(30)], 2, adapter_id, sampling) for adapter_id in (0, 1)]
    Driver(half, host_states(half, sources[:1])).serve(requests)
    for ask in requests:
        raw = oracle.logprobs(ask.prompt, name(ask.adapter_id))
        wrong = [abs(e.logprob - float(raw[i, e.token_id])) for i, e in enumerate(ask.prompt_logprobs)]
        assert len(wrong) == 29
        assert sum(wrong) / len(wrong) < (0.2 if dtype == "bfloat16" else 0.03)


def test_sizes_follow_the_adapters_and_the_flags(model: Path, sources: list[AdapterSource]) -> None:
    inferred = load(model, sources[:2]).capacity
    assert (inferred.max_lora_rank, inferred.max_lane_pages) == (8, 2)
    assert inferred.lora_targets == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    narrow = load(model, sources[1:2], max_loras=3).capacity
    assert narrow.lora_targets == ["q_proj", "v_proj"]
    assert narrow.rank_pages == {"qkv": 3, "qkv.vectors": 3, "norms.full": 3}
    flagged = load(model, sources[3:4], max_loras=2, max_lora_rank=33, lora_targets=["o_proj", "up_proj"]).capacity
    assert flagged.rank_pages == {"gate_up": 6, "gate_up.vectors": 2, "o": 6, "o.vectors": 2, "norms.full": 2}
    bare = load(model, [], enable_lora=True, max_loras=1, context_length=100).capacity
    assert (bare.max_lora_rank, bare.rank_pages["qkv"], bare.max_length) == (64, 4, 100)
    assert bare.kv_pages == 24 * 7
    pooled = load(model, [], enable_lora=True, max_loras=1, max_lora_rank=20, lora_pool_adapters=5).capacity
    groups = ("down", "gate_up", "o", "qkv")
    assert pooled.rank_pages == dict.fromkeys(groups, 10) | {f"{group}.vectors": 5 for group in groups} | {
        "norms.full": 5
    }
    one = sum(pooled.rank_page_bytes[group] * count // 5 for group, count in pooled.rank_pages.items())
    normed_with = 4 * 64 * 7 * 2  # bytes of the seven norms of the base and of its one lane
    assert pooled.lora_bytes == 5 * one + normed_with
    again = load(model, [], enable_lora=True, max_loras=1, max_lora_rank=20, lora_pool_bytes=7 * one - 1).capacity
    assert again.rank_pages["qkv"] == 12
    assert 0 < pooled.host_bytes < 1 << 50


def test_max_rank_flag_is_a_limit_and_an_inferred_one_not(
    model: Path, sources: list[AdapterSource], tmp_path: Path
) -> None:
    roots = {rank: make_adapter(model, tmp_path / f"wide{rank}", r=rank, seed=rank) for rank in (32, 33, 512)}
    inferred = load(model, sources[:1])  # the adapter has rank 8: a lane holds two pages
    flagged = load(model, [], enable_lora=True, max_lora_rank=31)
    highest = load(model, [], enable_lora=True, max_lora_rank=512, max_loras=1)
    try:
        for rank, runner, says in (
            (32, inferred, None),
            (33, inferred, "does not fit the pool made for rank 8"),
            (32, flagged, "rank 32 is above --max-lora-rank 31"),
            (512, highest, None),
        ):
            state = bring(runner, LoadAdapter(adapter_id=50 + rank, path=str(roots[rank])))
            assert (state.state, says is None) in (("host", True), ("failed", False))
            assert (says or "") in (state.error or "")
        oracle = Oracle(model, {"wide32": roots[32], "wide512": roots[512]})
        for rank, runner in ((32, inferred), (512, highest)):
            states = {50 + rank: bring(runner, LoadAdapter(adapter_id=50 + rank, path=str(roots[rank])))}
            tokens = Driver(runner, states).serve([Ask([5, 6, 7], 3, 50 + rank)])
            assert tokens == [oracle.greedy([5, 6, 7], 3, f"wide{rank}")]
    finally:
        for runner in (inferred, flagged, highest):
            runner.close()


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"context_length": 513}, ConfigError, "--context-length 513"),
        ({"lora_targets": ["wq"], "enable_lora": True}, ConfigError, "wq"),
        ({"device": "cuda"}, ConfigError, "--device cuda"),
        ({"lora_backend": "magic", "enable_lora": True}, ConfigError, "--lora-backend magic"),
        ({"attention_backend": "magic"}, ConfigError, "--attention-backend magic"),
    ],
)
def test_config_that_cannot_be_served_is_refused(
    model: Path, options: dict[str, Any], error: type[Exception], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(error, match=says):
        load(model, [], **options)


def test_broken_startup_adapter_ends_the_launch(model: Path, sources: list[AdapterSource]) -> None:
    with pytest.raises(AdapterError, match=r"a3.*rank 20.*--max-lora-rank 8"):
        load(model, sources, max_lora_rank=8, lora_targets=["all"])
    with pytest.raises(AdapterError, match=r"a1.*--lora-target-modules"):
        load(model, sources, lora_targets=["q_proj"])
