"""The normal form of each format against the weights that PEFT merges."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from fixtures.adapters.adapter_zoo import ZOO, merged, save
from fixtures.adapters.refusals import load, refusal
from safetensors.torch import load_file, save_file

from engine.errors import AdapterError
from model_runner.config import read_model_config
from model_runner.lora.site import NORMS
from model_runner.lora.store import AdapterStore
from model_runner.model.decoders.decoder import Decoder
from model_runner.model.load import load_model

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"

pytestmark = [
    pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`"),
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed"),
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match"),  # AdaLoRA's are module names
]


@pytest.mark.parametrize("name", ZOO)
def test_effective_weights_equal_those_that_peft_merges(
    name: str, model: Path, zoo: dict[str, Path], decoder: Decoder
) -> None:
    adapter, expected, changed = load(decoder.sites, zoo[name]), merged(model, zoo[name]), 0
    for site in decoder.sites:
        deltas = adapter.deltas.get(site.name, (None,) * len(site.slices))
        for piece, delta in zip(site.slices, deltas, strict=True):
            module = f"{site.path}.{piece.module}" if site.path else piece.module
            if site.group == NORMS:
                weight = site.base.weight if delta is None or delta.full_weight is None else delta.full_weight
                changed += delta is not None
                assert torch.equal(weight, expected[f"{module}.weight"])
                continue
            weight = (site.base.weight.t() if site.embeds else site.base.weight)[piece.start : piece.stop].double()
            bias = None if site.base.bias is None else site.base.bias[piece.start : piece.stop].clone()
            if delta is not None:
                if delta.full_weight is not None:
                    weight = (delta.full_weight.t() if site.embeds else delta.full_weight).double()
                weight = weight * (1 if delta.gain is None else delta.gain.double()[:, None])
                weight = weight + delta.b.double().t() @ delta.a.double()
                changed += 1
                if delta.bias is not None:
                    assert bias is not None
                    bias += delta.bias
            whole = expected[f"{module}.weight"].double()
            torch.testing.assert_close(weight, whole.t() if site.embeds else whole, atol=1e-5, rtol=1e-5)
            if bias is not None:
                torch.testing.assert_close(bias, expected[f"{module}.bias"], atol=1e-5, rtol=1e-5)
    assert changed >= 2


RANKS = {"loha": 9, "loha patterns": 25, "lokr full": 64, "lokr thin": 4, "adalora": 5, "dora rslora": 17}


def test_ranks_are_those_of_the_normal_form(zoo: dict[str, Path], decoder: Decoder) -> None:
    assert {name: load(decoder.sites, zoo[name]).rank for name in RANKS} == RANKS
    pruned = load(decoder.sites, zoo["adalora pruned"])
    ranks = {delta.rank for slices in pruned.deltas.values() for delta in slices if delta is not None}
    assert {0, pruned.rank} < ranks


def test_too_high_rank_of_the_normal_form_is_refused(model: Path, decoder: Decoder, tmp_path: Path) -> None:
    wide = save(model, tmp_path / "wide", peft.LoHaConfig(r=23, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert "LoHa of rank 23 is served as rank 529; at most 512 is" in refusal(decoder.sites, wide)
    narrow = save(model, tmp_path / "narrow", peft.LoHaConfig(r=5, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    store = AdapterStore(decoder.sites, torch.float32, max_rank=24, targets=None)
    with pytest.raises(AdapterError, match=r"rank 25 is above --max-lora-rank 24 \(PEFT LoHa of rank 5"):
        store.load(1, "fox", narrow)


def test_lokr_in_tucker_form_equals_the_plain_one(decoder: Decoder, copy: Callable[[str], Path]) -> None:
    root = copy("lokr")
    plain = load(decoder.sites, root)
    tensors = load_file(root / WEIGHTS)
    for name in [name for name in tensors if name.endswith("lokr_w2_b")]:
        stem = name.removesuffix("_b")
        core = torch.tensor([[2.0, 1.0], [0.5, -1.0]])
        tensors[f"{stem}_b"] = core.inverse() @ tensors[f"{stem}_b"]
        tensors[f"{stem}_a"] = tensors[f"{stem}_a"].t().contiguous()
        tensors[f"{stem.removesuffix('lokr_w2')}lokr_t2"] = core.view(2, 2, 1, 1)
    save_file(tensors, root / WEIGHTS)
    for name, slices in load(decoder.sites, root).deltas.items():
        for ours, theirs in zip(slices, plain.deltas[name], strict=True):
            if ours is not None:
                torch.testing.assert_close(ours.b.t() @ ours.a, theirs.b.t() @ theirs.a)


@pytest.mark.parametrize("use_dora", [False, True])
def test_fused_module_maps_to_all_its_slices(use_dora: bool, decoder: Decoder, tmp_path: Path) -> None:
    sites, tensors = {site.name: site for site in decoder.sites}, {}
    draw = torch.Generator().manual_seed(2)
    fused = [(sites[f"layers.{n}.{group}"], module) for n in range(3) for group, module in FUSED.items()]
    for site, module in fused:
        stem = f"base_model.model.{site.path}.{module}"
        tensors[f"{stem}.lora_A.weight"] = torch.randn(4, site.in_features, generator=draw)
        tensors[f"{stem}.lora_B.weight"] = torch.randn(site.out_features, 4, generator=draw)
        if use_dora:
            tensors[f"{stem}.lora_magnitude_vector"] = torch.rand(site.out_features, generator=draw)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": list(FUSED.values())}
    (tmp_path / CONFIG).write_text(json.dumps(config | {"use_dora": use_dora}))
    save_file(tensors, tmp_path / WEIGHTS)
    adapter = load(decoder.sites, tmp_path)
    for site, module in fused:
        stem = f"base_model.model.{site.path}.{module}"
        whole = 2 * tensors[f"{stem}.lora_B.weight"] @ tensors[f"{stem}.lora_A.weight"]
        for piece, delta in zip(site.slices, adapter.deltas[site.name], strict=True):
            rows = slice(piece.start, piece.stop)
            expected = whole[rows]
            if use_dora:
                turned = site.base.weight[rows] + expected
                gain = tensors[f"{stem}.lora_magnitude_vector"][rows] / turned.norm(dim=1)
                torch.testing.assert_close(delta.gain, gain)
                expected = gain[:, None] * expected
            torch.testing.assert_close(delta.b.t() @ delta.a, expected)


FUSED = {"qkv": "qkv_proj", "gate_up": "gate_up_proj"}


def test_sharded_dora_equals_the_unsharded_one(
    decoder: Decoder, copy: Callable[[str], Path], zoo: dict[str, Path]
) -> None:
    root = copy("dora")
    tensors = load_file(root / WEIGHTS)
    (root / WEIGHTS).unlink()
    where = {key: f"adapter_model-0000{number % 2}.safetensors" for number, key in enumerate(sorted(tensors))}
    for file in sorted(set(where.values())):
        save_file({key: value for key, value in tensors.items() if where[key] == file}, root / file)
    (root / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": where}))
    ours, theirs = load(decoder.sites, root), load(decoder.sites, zoo["dora"])
    for site, slices in theirs.deltas.items():
        for one, two in zip(ours.deltas[site], slices, strict=True):
            assert torch.equal(one.a, two.a)
            assert torch.equal(one.gain, two.gain)


def test_saved_embedding_must_equal_the_bases(decoder: Decoder, copy: Callable[[str], Path]) -> None:
    root = copy("embedding")
    tensors = load_file(root / WEIGHTS)
    (saved,) = (key for key in tensors if "base_layer" in key)
    tensors[saved][17, 3] += 1
    save_file(tensors, root / WEIGHTS)
    assert repr(saved) in refusal(decoder.sites, root)


def test_gain_in_bfloat16_is_as_precise_as_in_float32(model: Path, zoo: dict[str, Path], decoder: Decoder) -> None:
    half = load_model(model, read_model_config(model), device=torch.device("cpu"), dtype=torch.bfloat16)
    ours, theirs = load(half.sites, zoo["dora"], torch.bfloat16), load(decoder.sites, zoo["dora"])
    for site, slices in theirs.deltas.items():
        for one, two in zip(ours.deltas[site], slices, strict=True):
            torch.testing.assert_close(one.gain, two.gain, atol=0, rtol=2e-3)  # W in bfloat16 has 8 significant bits
