"""A mixture of experts against a slow sum over all experts; its parts on two ranks; adapters on experts and routers
against PEFT; adapters without experts keep the grouped matmul.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures.adapters.expert_adapters import make_expert_adapter
from fixtures.adapters.resident import attach_adapters
from fixtures.models.drive import Driver, Row
from fixtures.models.oracle import Oracle
from fixtures.models.tiny_models import VOCAB, build, make_adapter
from safetensors.torch import load_file, save_file
from torch.nn.functional import silu

from engine.errors import AdapterError, ConfigError
from model_runner.config import read_model_config
from model_runner.lora.store import AdapterStore
from model_runner.model.layers.experts import SparseMLP
from model_runner.model.layers.weights import Weights
from model_runner.model.load import load_model
from model_runner.platform.shard import Shard
from model_runner.step.batch import Batch

pytestmark = pytest.mark.filterwarnings(  # PEFT warns of patterns for parameters, and then uses them
    "ignore:The following (rank|alpha)_pattern keys did not match any targeted module:RuntimeWarning"
)

CPU = torch.device("cpu")
TinyModel = Callable[[str], Path]
STACKED = "base_model.model.model.layers.{}.mlp.experts.lora_{}.weight"
NO_BATCH = Batch(torch.empty(0), torch.empty(0), None)


def experts_of(path: Path, layer: int, shard: Shard | None = None) -> SparseMLP:
    decoder = load_model(path, read_model_config(path), device=CPU, dtype=torch.float32, shard=shard)
    block = decoder.layers[layer].mlp
    assert isinstance(block, SparseMLP)
    return block


def slow(block: SparseMLP, x_TH: torch.Tensor) -> torch.Tensor:
    """Returns the weighted sum of every expert for every token in float64; most weights are zero."""
    x = x_TH.double()
    chances = (x @ block.router.site.base.weight.double().t()).softmax(-1)
    kept = torch.where(chances >= chances.topk(block.per_token).values[:, -1:], chances, 0.0)
    if block.renormalize:
        kept = kept / kept.sum(-1, keepdim=True)
    answers = []
    for gate_up, down in zip(block.gate_up_EIH.double(), block.down_EHI.double(), strict=True):
        gate, up = (x @ gate_up.t()).chunk(2, dim=-1)
        answers.append((silu(gate) * up) @ down.t())
    return torch.einsum("te,eth->th", kept, torch.stack(answers)).float()


@pytest.mark.parametrize("tokens", [1, 2, 40])
@pytest.mark.parametrize(("family", "layer"), [("mixtral", 0), ("qwen3-moe", 2)])
def test_sparse_mlp_equals_the_sum_over_all_experts(
    family: str, layer: int, tokens: int, tiny_model: TinyModel
) -> None:
    block = experts_of(tiny_model(family), layer)
    x_TH = torch.randn(tokens, 64, generator=torch.Generator().manual_seed(tokens))
    torch.testing.assert_close(block(x_TH, NO_BATCH), slow(block, x_TH), atol=1e-4, rtol=1e-4)


def test_expert_weights_need_not_sum_to_one(tiny_model: TinyModel) -> None:
    block = experts_of(tiny_model("qwen3-moe"), 0)
    block.renormalize = False
    x_TH = torch.randn(9, 64, generator=torch.Generator().manual_seed(1))
    weights_TK, _ = block.route(x_TH, NO_BATCH)
    assert (weights_TK.sum(-1) < 0.999).any()
    torch.testing.assert_close(block(x_TH, NO_BATCH), slow(block, x_TH), atol=1e-4, rtol=1e-4)


def test_outputs_of_two_ranks_sum_to_the_whole(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_model("mixtral")
    x_TH = torch.randn(7, 64, generator=torch.Generator().manual_seed(2))
    whole = experts_of(path, 1)(x_TH, NO_BATCH)
    monkeypatch.setattr(Shard, "all_reduce", lambda self, partial: partial)
    shares = [experts_of(path, 1, Shard(rank, 2))(x_TH, NO_BATCH) for rank in range(2)]
    torch.testing.assert_close(shares[0] + shares[1], whole, atol=1e-4, rtol=1e-4)


def test_attention_adapters_keep_the_grouped_matmul(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for family, dense in (("mixtral", []), ("qwen3-moe", [1])):
        path = tiny_model(family)
        decoder = load_model(path, read_model_config(path), device=CPU, dtype=torch.float32)
        groups = {group: [s.layer for s in decoder.sites if s.group == group] for group in ("qkv", "gate_up", "down")}
        assert groups == {"qkv": [0, 1, 2], "gate_up": dense, "down": dense}
        adapter = make_adapter(path, tmp_path / family, targets=["q_proj", "v_proj"])
        lora = attach_adapters(decoder, {"attention": adapter})
        assert lora.pages.page_counts == {"qkv": 1}
        monkeypatch.setattr(SparseMLP, "_compute_by_expert", None)  # a call would fail, so the grouped matmuls are used
        Driver(decoder, lora=lora).step([(Row([3, 4, 5], lane=1), 3), (Row([6]), 1)])


def test_expert_size_that_ranks_do_not_divide_is_refused(tiny_model: TinyModel) -> None:
    model_config = read_model_config(tiny_model("mixtral"))
    assert model_config.experts is not None
    odd = dataclasses.replace(model_config, experts=dataclasses.replace(model_config.experts, width=33))
    with pytest.raises(ConfigError, match="intermediate size of an expert"):
        SparseMLP(odd, 0, Weights(CPU, torch.float32, Shard(0, 2)))


def test_steps_that_wait_for_the_device_are_not_captured(tiny_model: TinyModel) -> None:
    for family, capturable in (("llama2", True), ("mixtral", False)):  # experts wait for the device
        path = tiny_model(family)
        assert load_model(path, read_model_config(path), device=CPU, dtype=torch.float32).capturable is capturable


def test_memory_margin_covers_several_experts_per_token(tiny_model: TinyModel) -> None:
    assert read_model_config(tiny_model("llama2")).widest == 96
    assert read_model_config(tiny_model("qwen3-moe")).widest == 3 * (48 + 64)


def test_tokens_are_not_changed_by_a_poisoned_one(tiny_model: TinyModel) -> None:
    block = experts_of(tiny_model("mixtral"), 0)
    x_TH = torch.randn(6, 64, generator=torch.Generator().manual_seed(3))
    expected = block(x_TH, NO_BATCH)
    x_TH[2] = float("nan")
    ours = block(x_TH, NO_BATCH)
    assert ours[2].isnan().all()
    rest = [0, 1, 3, 4, 5]
    torch.testing.assert_close(ours[rest], expected[rest], atol=1e-5, rtol=1e-5)


MIXTRAL, QWEN = ("w1", "w2", "w3"), ("gate_proj", "up_proj", "down_proj")


def check_against_peft(path: Path, adapters: dict[str, Path]) -> None:
    """Checks all adapters and the base in one batch, whole and in chunks. Each adapter has its own PEFT model."""
    oracles = {name: Oracle(path, {name: directory}) for name, directory in adapters.items()}
    draw, names, first = random.Random(5), [None, *adapters], next(iter(adapters))
    asks: list[tuple[list[int], int]] = []
    while len(asks) < 3 * len(names):
        lane = len(asks) % len(names)
        prompt = [draw.randrange(VOCAB) for _ in range(draw.randrange(1, 12))]
        if oracles[names[lane] or first].is_unambiguous(prompt, 6, names[lane]):
            asks.append((prompt, lane))
    expected = [oracles[names[lane] or first].greedy(prompt, 6, names[lane]) for prompt, lane in asks]
    for (prompt, _), name in zip(asks[1:], adapters, strict=False):
        assert (oracles[name].logits(prompt, name) - oracles[name].logits(prompt)).abs().max() > 0.1
    decoder = load_model(path, read_model_config(path), device=CPU, dtype=torch.float32)
    lora = attach_adapters(decoder, adapters)
    prompts, lanes = [prompt for prompt, _ in asks], [lane for _, lane in asks]
    assert Driver(decoder, lora=lora).greedy(prompts, 6, lanes=lanes) == expected
    assert Driver(decoder, lora=lora).greedy(prompts, 6, lanes=lanes, chunk=5, late=1) == expected


@pytest.mark.parametrize(("family", "linears"), [("mixtral", MIXTRAL), ("qwen3-moe", QWEN)])
def test_adapters_by_expert_equal_peft(family: str, linears: tuple[str, ...], tmp_path: Path) -> None:
    path = build(family, tmp_path / "model", **({"mlp_only_layers": []} if family == "qwen3-moe" else {}))
    adapters = {
        "experts": make_expert_adapter(path, tmp_path / "a", linears, seed=1),
        "all": make_expert_adapter(path, tmp_path / "b", [*linears, "gate", "q_proj"], r=20, alpha=30, seed=2),
        "few": make_expert_adapter(path, tmp_path / "c", linears if family == "qwen3-moe" else ["w2"], r=1, seed=3),
        "attention": make_adapter(path, tmp_path / "d", targets=["k_proj", "o_proj"], seed=4),
    }
    check_against_peft(path, adapters)


@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe"])
def test_adapters_on_stacked_parameters_equal_peft(family: str, tmp_path: Path) -> None:
    path = build(family, tmp_path / "model")
    both = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    options: dict[str, dict[str, Any]] = {
        "both": {"targets": [], "target_parameters": both},
        "down": {"targets": ["q_proj"], "target_parameters": ["experts.down_proj"], "r": 17, "alpha": 20},
        "gate_up": {"targets": [], "target_parameters": ["gate_up_proj", "gate.weight"], "rslora": True},
        "patterns": {
            "targets": ["k_proj"],
            "target_parameters": both,
            "rank_pattern": {"experts.gate_up_proj": 3},
            "alpha_pattern": {r".*\.down_proj": 5},
        },
        "as before": {"targets": ["o_proj", *(MIXTRAL if family == "mixtral" else QWEN)]},
    }
    adapters = {
        name: make_adapter(path, tmp_path / name, seed=seed, **given)
        for seed, (name, given) in enumerate(options.items(), start=1)
    }
    check_against_peft(path, adapters)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda config, tensors: config.update(target_parameters=["experts.up_proj"]), "fit no parameter"),
        (lambda config, tensors: config.update(r=3), "fit no parameter"),
        (lambda config, tensors: config.update(target_parameters=["experts.down_proj"]), "fit no parameter"),
        (lambda config, tensors: tensors.pop(STACKED.format(2, "A")), "fit no parameter"),
    ],
)
def test_stacked_parameters_that_do_not_fit_are_named(
    change: Callable[[dict[str, Any], Any], object],
    named: str,
    tiny_model: TinyModel,
    tmp_path: Path,
) -> None:
    model = tiny_model("mixtral")
    path = make_adapter(model, tmp_path / "a", targets=[], target_parameters=["experts.gate_up_proj"])
    config = json.loads((path / "adapter_config.json").read_text())
    tensors = load_file(path / "adapter_model.safetensors")
    change(config, tensors)
    (path / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, path / "adapter_model.safetensors")
    decoder = load_model(model, read_model_config(model), device=CPU, dtype=torch.float32)
    with pytest.raises(AdapterError, match=named):
        AdapterStore(decoder.sites, torch.float32, max_rank=None, targets=None).load(1, "a", path)


def test_layer_without_its_stack_is_the_bases(
    tiny_model: TinyModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model("mixtral")
    path = make_adapter(model, tmp_path / "a", targets=[], target_parameters=["experts.gate_up_proj"])
    tensors = load_file(path / "adapter_model.safetensors")
    for half in "AB":
        tensors.pop(STACKED.format(2, half))
    save_file(tensors, path / "adapter_model.safetensors")
    decoder = load_model(model, read_model_config(model), device=CPU, dtype=torch.float32)
    adapter = AdapterStore(decoder.sites, torch.float32, max_rank=None, targets=None).load(1, "a", path)
    assert {decoder_site.layer for decoder_site in decoder.sites if decoder_site.name in adapter.deltas} == {0, 1}
    assert "target_parameters means 4 modules without tensors" in caplog.text
