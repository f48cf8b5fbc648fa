"""The whole runner with the triton attention backend and ops produces the oracle's tokens."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from fixtures.adapters.adapter_zoo import ZOO, save
from fixtures.models.oracle import Oracle
from fixtures.models.tiny_models import VOCAB
from fixtures.scheduling.step_driver import Ask, Driver
from fixtures.scheduling.step_driver import load as bring

from engine.config.process_configs import AdapterSource, Endpoints, RunnerConfig
from engine.errors import ConfigError
from engine.messages import LoadAdapter
from model_runner.compute.attention import triton_backend
from model_runner.compute.ops import base
from model_runner.compute.ops.triton_ops import TritonOps
from model_runner.runner import Runner

ENDPOINTS = Endpoints(tokenizer="", scheduler="", runner="", zmq_server="")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class CountedOps(TritonOps):
    """Records for each fused store whether it normalised heads."""

    stores: ClassVar[list[bool]] = []

    def rope_and_store(self, *args: Any) -> torch.Tensor:
        self.stores.append(args[-1] is not None)
        return super().rope_and_store(*args)


def load(path: Path, device: str = DEVICE, adapter: Path | None = None) -> Runner:
    given = [] if adapter is None else [AdapterSource(adapter_id=1, name="norms", path=str(adapter), root=str(adapter))]
    config = RunnerConfig(
        endpoints=ENDPOINTS,
        model_path=str(path),
        device=device,  # type: ignore[arg-type]
        dtype="float32",
        attention_backend="triton",
        max_running_requests=4,
        enable_lora=bool(given),
        adapters=given,
    )
    return Runner.load(config)


@pytest.mark.parametrize(
    "family",
    [
        "mistral",  # a window of 16, two query heads to a key/value head, heads of 24
        "qwen3",  # norms of q and k over each head
        "olmo2",  # norms of q and k over all heads: not fused
    ],
)
def test_triton_tokens_equal_the_oracle(
    family: str, tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "create", lambda device: CountedOps())
    path = tiny_model(family)
    oracle, draw, asks = Oracle(path), random.Random(5), list[Ask]()
    for length in (40, 3, 21):
        prompt = [draw.randrange(VOCAB) for _ in range(length)]
        while not oracle.is_unambiguous(prompt, 6):
            prompt = [draw.randrange(VOCAB) for _ in range(length)]
        asks.append(Ask(prompt, 6))
    runner = load(path)
    try:
        assert runner.capacity.attention_backend == "triton"
        CountedOps.stores.clear()
        assert Driver(runner).serve(asks, longest_chunk=20) == [oracle.greedy(ask.prompt, 6) for ask in asks]
        assert set(CountedOps.stores) == {"mistral": {False}, "qwen3": {True}, "olmo2": set()}[family]
    finally:
        runner.close()


@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_adapter_norms_and_base_norms_share_a_step(
    family: str, tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "create", lambda device: CountedOps())
    path = tiny_model(family)
    root = save(path, tmp_path / "norms", ZOO["all norms"](), seed=3)
    oracle, draw, asks = Oracle(path, {"norms": root}), random.Random(5), list[Ask]()
    for number, length in enumerate((9, 3, 12)):
        adapter_id, prompt = number % 2, list[int]()
        while not prompt or not oracle.is_unambiguous(prompt, 5, "norms" if adapter_id else None):
            prompt = [draw.randrange(VOCAB) for _ in range(length)]
        asks.append(Ask(prompt, 5, adapter_id))
    runner = load(path, adapter=root)
    try:
        driver = Driver(runner, {1: bring(runner, LoadAdapter(adapter_id=1, path=str(root)))})
        CountedOps.stores.clear()
        expected = [oracle.greedy(ask.prompt, 5, "norms" if ask.adapter_id else None) for ask in asks]
        assert driver.serve(asks, longest_chunk=7) == expected
        assert set(CountedOps.stores) == {family == "qwen3"}
    finally:
        runner.close()


def test_triton_on_a_cpu_is_refused_in_one_line(
    tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_backend, "interpreting", lambda: False)
    with pytest.raises(ConfigError, match="--attention-backend triton: needs a CUDA device"):
        load(tiny_model("mistral"), "cpu")
