"""The decoder: LoRA at every site, one all-reduce after the delta, the sizes of the KV pool, and a rank's shard."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures.models.drive import Driver, Row

from engine.errors import ConfigError
from model_runner.config import read_model_config
from model_runner.lora.backends.base import LoraBackend
from model_runner.lora.pool.pages import RankPagePool
from model_runner.lora.site import Site
from model_runner.model.decoders.decoder import Decoder
from model_runner.model.layers.weights import Weights
from model_runner.model.load import build_decoder, load_model
from model_runner.platform.shard import Shard
from model_runner.step.kv_pool import KvPool, page_bytes
from model_runner.step.layout import Layout

CPU = torch.device("cpu")
TinyModel = Callable[[str], Path]


class Recorder(LoraBackend):
    """Changes nothing, and records every call."""

    def __init__(self) -> None:
        super().__init__(RankPagePool([], {}, 0, torch.float32, CPU))
        self.calls: list[tuple[str, Any]] = []

    def plan(self, layout: Layout, into: Any | None = None) -> Any:
        return f"a plan of {layout.tokens}"

    def adapt(self, y_TO: torch.Tensor, x: torch.Tensor, site: Site, meta: Any) -> None:
        self.calls.append((site.name, meta))


def load(path: Path) -> Decoder:
    return load_model(path, read_model_config(path), device=CPU, dtype=torch.float32)


@pytest.mark.parametrize(
    ("family", "sites"),
    [
        ("llama-bias", 14),
        ("gemma2", 14),
        ("phi3", 14),
        ("granite", 14),
        ("olmo2", 14),
        ("mixtral", 35),
        ("qwen3-moe", 36),
    ],
)
def test_every_site_is_adapted_once(family: str, sites: int, tiny_model: TinyModel) -> None:
    decoder, lora = load(tiny_model(family)), Recorder()
    plain = Driver(decoder).step([(Row([5, 6, 7]), 3)])
    ours = Driver(decoder, lora=lora).step([(Row([5, 6, 7]), 3)])
    assert torch.equal(ours, plain)
    linears = [site for site in decoder.sites if site.group != "norms"]
    asked = [site for site in linears if site.group != "experts"]  # experts are computed by grouped matmuls instead
    assert lora.calls == [(site.name, "a plan of 3") for site in asked]
    assert len({site.name for site in decoder.sites}) == len(decoder.sites)
    assert len(linears) == sites
    assert {site.group for site in asked} <= {"embed", "qkv", "o", "gate_up", "down", "head", "router"}


def test_row_parallel_linears_reduce_after_lora(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, lora = load(tiny_model("llama2")), Recorder()
    after: list[str] = []

    def all_reduce(self: Shard, partial: torch.Tensor) -> torch.Tensor:
        after.append(lora.calls[-1][0])
        return partial

    monkeypatch.setattr(Shard, "all_reduce", all_reduce)
    Driver(decoder, lora=lora).step([(Row([5]), 1)])
    assert after == [site.name for site in decoder.sites if site.group in ("o", "down")]


def test_two_ranks_hold_the_halves_of_every_site(tiny_model: TinyModel) -> None:
    path = tiny_model("llama-yarn")
    whole, config = load(path), read_model_config(path)
    ranks = [load_model(path, config, device=CPU, dtype=torch.float32, shard=Shard(rank, 2)) for rank in range(2)]
    for site, *halves in zip(whole.sites, *(decoder.sites for decoder in ranks), strict=True):
        if site.group in ("embed", "head", "norms"):
            assert all(torch.equal(half.base.weight, site.base.weight) for half in halves)
            continue
        if site.group in ("o", "down"):
            assert torch.equal(torch.cat([half.base.weight for half in halves], dim=1), site.base.weight)
            continue
        for part, *parts in zip(site.slices, *(half.slices for half in halves), strict=True):
            ours = [half.base.weight[p.start : p.stop] for half, p in zip(halves, parts, strict=True)]
            assert torch.equal(torch.cat(ours), site.base.weight[part.start : part.stop])


def test_two_ranks_hold_the_halves_of_fused_tensors(tiny_model: TinyModel) -> None:
    path = tiny_model("phi3")
    whole, config = load(path), read_model_config(path)
    ranks = [load_model(path, config, device=CPU, dtype=torch.float32, shard=Shard(rank, 2)) for rank in range(2)]
    layer = whole.layers[1]
    qkv, gate_up = (linear.site.base.weight for linear in (layer.attention.qkv, next(layer.mlp.linears())))
    for site, parts in ((qkv, (64, 32, 32)), (gate_up, (96, 96))):
        index = next(i for i, other in enumerate(whole.sites) if other.base.weight is site)
        halves = [decoder.sites[index].base.weight.split([part // 2 for part in parts]) for decoder in ranks]
        joined = [torch.cat([half[i] for half in halves]) for i in range(len(parts))]
        assert torch.equal(torch.cat(joined), site)


def test_olmo2_is_refused_on_two_ranks(tiny_model: TinyModel) -> None:
    with pytest.raises(ConfigError, match="--tp-size 2: OLMo 2"):
        build_decoder(read_model_config(tiny_model("olmo2")), Weights(CPU, torch.float32, Shard(0, 2)))


def test_row_parallel_bias_is_on_rank_0_alone(tiny_model: TinyModel) -> None:
    path = tiny_model("llama-bias")
    config = read_model_config(path)
    with pytest.raises(ConfigError, match="does not divide"):
        Decoder(config, Weights(CPU, torch.float32, Shard(0, 2)))  # one key/value head cannot be divided
    wide = dataclasses.replace(config, num_kv_heads=4)
    biases = [Decoder(wide, Weights(CPU, torch.float32, Shard(rank, 2))).sites[2].base.bias for rank in range(2)]
    assert biases[0] is not None
    assert biases[1] is None


def test_kv_pool_bytes_are_those_of_its_tensors(tiny_model: TinyModel) -> None:
    config = read_model_config(tiny_model("mistral"))
    pool = KvPool(config, 5, 4, torch.bfloat16, CPU, Shard())
    tensors = [tensor for layer in range(config.num_layers) for tensor in pool.layer(layer)]
    assert {tuple(tensor.shape) for tensor in tensors} == {(6, 4, 2, 24)}
    assert pool.bytes == sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert pool.bytes == 6 * page_bytes(config, 4, torch.bfloat16, Shard())
    assert page_bytes(config, 4, torch.bfloat16, Shard(0, 2)) * 2 == page_bytes(config, 4, torch.bfloat16, Shard())


def test_logits_are_of_the_given_rows(tiny_model: TinyModel) -> None:
    decoder = load(tiny_model("qwen3"))
    hidden = torch.randn(5, decoder.config.hidden_size, generator=torch.Generator().manual_seed(0))
    logits = decoder.logits(hidden[[1, 4]])
    assert logits.shape == (2, decoder.config.vocab_size)
    torch.testing.assert_close(logits, decoder.logits(hidden)[[1, 4]], atol=1e-5, rtol=1e-5)
