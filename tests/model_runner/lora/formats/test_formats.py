"""Each format's normal form against the weights that PEFT itself merges, and what is refused of each."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from fixtures.adapters.adapter_zoo import BIASED, ZOO, merged, save
from safetensors.torch import load_file, save_file

from engine.errors import AdapterError
from model_runner.config import read_model_config
from model_runner.lora.formats import registry
from model_runner.lora.peft.config import PROVENANCE, PeftOptions
from model_runner.lora.peft.names import WRAPPERS, markers
from model_runner.lora.site import NORMS
from model_runner.lora.store import AdapterStore
from model_runner.model.families.decoder import Decoder
from model_runner.model.load import load_model

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"

pytestmark = [
    pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`"),
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed"),
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match"),  # AdaLoRA's are no patterns
]


@pytest.fixture(scope="module")
def model(tiny_model: Callable[[str], Path]) -> Path:
    """A base with biases everywhere and a head of its own."""
    return tiny_model("llama-bias")


@pytest.fixture(scope="module")
def decoder(model: Path) -> Decoder:
    """The base as we load it."""
    return load_model(model, read_model_config(model), device=torch.device("cpu"), dtype=torch.float32)


@pytest.fixture(scope="module")
def zoo(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One adapter of each format."""
    root = tmp_path_factory.mktemp("zoo")
    return {name: save(model, root / name, config(), seed) for seed, (name, config) in enumerate(ZOO.items())}


@pytest.fixture
def copy(zoo: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """An adapter of the zoo, to be changed."""
    return lambda name: Path(shutil.copytree(zoo[name], tmp_path / "copy"))


def load(decoder: Decoder, root: Path, dtype: torch.dtype = torch.float32, **limits: Any) -> Any:
    return AdapterStore(decoder.sites, dtype, max_rank=None, targets=None, **limits).load(1, "fox", root)


def refusal(decoder: Decoder, root: Path, **limits: Any) -> str:
    with pytest.raises(AdapterError) as caught:
        load(decoder, root, **limits)
    assert caught.value.message.startswith("adapter 'fox': ")
    return caught.value.message


@pytest.mark.parametrize("name", ZOO)
def test_the_effective_weights_are_those_that_peft_merges(
    name: str, model: Path, zoo: dict[str, Path], decoder: Decoder
) -> None:
    adapter, expected, changed = load(decoder, zoo[name]), merged(model, zoo[name]), 0
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
    assert {name: load(decoder, zoo[name]).rank for name in RANKS} == RANKS
    pruned = load(decoder, zoo["adalora pruned"])
    ranks = {delta.rank for slices in pruned.deltas.values() for delta in slices if delta is not None}
    assert {0, pruned.rank} < ranks


def test_a_format_whose_normal_form_is_too_wide_says_so(model: Path, decoder: Decoder, tmp_path: Path) -> None:
    wide = save(model, tmp_path / "wide", peft.LoHaConfig(r=23, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert "LoHa of rank 23 is served as rank 529; at most 512 is" in refusal(decoder, wide)
    narrow = save(model, tmp_path / "narrow", peft.LoHaConfig(r=5, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    store = AdapterStore(decoder.sites, torch.float32, max_rank=24, targets=None)
    with pytest.raises(AdapterError, match=r"rank 25 is above --max-lora-rank 24 \(PEFT LoHa of rank 5"):
        store.load(1, "fox", narrow)


def test_the_parts_of_a_lokr_in_tucker_form(decoder: Decoder, copy: Callable[[str], Path]) -> None:
    root = copy("lokr")
    plain = load(decoder, root)
    tensors = load_file(root / WEIGHTS)
    for name in [name for name in tensors if name.endswith("lokr_w2_b")]:
        stem = name.removesuffix("_b")
        core = torch.tensor([[2.0, 1.0], [0.5, -1.0]])
        tensors[f"{stem}_b"] = core.inverse() @ tensors[f"{stem}_b"]
        tensors[f"{stem}_a"] = tensors[f"{stem}_a"].t().contiguous()
        tensors[f"{stem.removesuffix('lokr_w2')}lokr_t2"] = core.view(2, 2, 1, 1)
    save_file(tensors, root / WEIGHTS)
    for name, slices in load(decoder, root).deltas.items():
        for ours, theirs in zip(slices, plain.deltas[name], strict=True):
            if ours is not None:
                torch.testing.assert_close(ours.b.t() @ ours.a, theirs.b.t() @ theirs.a)


# ---------------------------------------------------------------------------------------------------- every config key


CONFIGS = {
    "LORA": peft.LoraConfig,
    "ADALORA": peft.AdaLoraConfig,
    "LOHA": peft.LoHaConfig,
    "LOKR": peft.LoKrConfig,
}


OTHER_OPTIONS = ("use_tomorrow", "use_dora", "init_r", "use_rslora", "alpha")
"""Options of some formats, and of none."""


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_option_of_pefts_config_is_classified(kind: str) -> None:
    form = registry.find_format(kind)
    common, refused = frozenset(PeftOptions.__struct_fields__), registry.refused_options()
    known = form.used_options() | form.harmless | common | PROVENANCE | refused.keys()
    strangers = {field.name for field in dataclasses.fields(CONFIGS[kind])} - known
    if kind == "ADALORA":  # LoRA's options that its layers do not look at are refused where they are set
        strangers -= {"use_dora", "lora_bias", "target_parameters", "alora_invocation_tokens"}
    assert strangers == set()
    sorts = [form.used_options(), form.harmless, common, PROVENANCE, frozenset(refused)]
    assert sum(map(len, sorts)) == len(frozenset().union(*sorts)), "an option is of two sorts"


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("option", [*registry.refused_options(), *OTHER_OPTIONS])
def test_an_option_that_is_not_served_is_refused_by_name(
    kind: str, option: str, decoder: Decoder, copy: Callable[[str], Path]
) -> None:
    form = registry.find_format(kind)
    if option in form.used_options() | form.harmless:
        pytest.skip("the format has it")
    root = copy({"LORA": "lora", "ADALORA": "adalora", "LOHA": "loha", "LOKR": "lokr"}[kind])
    path = root / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | {option: 7}))
    assert re.search(rf"\b{option}=7\b", refusal(decoder, root))


# ---------------------------------------------------------------------------------------------------- every tensor


MODULE = "base_model.model.model.layers.0.self_attn.q_proj"
NORM = "base_model.model.model.layers.0.input_layernorm"
STRAY = [f"{MODULE}.{marker}" for marker in sorted(markers())] + [
    f"{MODULE}.{marker}.default.{own}" for marker in sorted(markers() | WRAPPERS) for own in ("weight", "bias")
]
STRAY += [f"{MODULE}.{piece}.default" for piece in registry.refused_parts()]
STRAY += [
    f"{MODULE}.weight",
    f"{MODULE}.token_adapter.trainable_tokens_delta",
    "base_model.model.lm_head.token_adapter.trainable_tokens_delta",
    "base_model.model.lm_head.modules_to_save.weight",
    "base_model.model.lm_head.original_module.weight",
    f"{MODULE}.bias",
    f"{MODULE}.lora_A.a.b.weight",
    f"{MODULE}.rotary",
    f"{NORM}.weight",
    f"{NORM}.bias",
    f"{NORM}.modules_to_save.weight",
    f"{NORM}.base_layer.weight",
    f"{NORM}.lora_A.weight",
    f"{NORM}.ia3_l",
    "base_model.model.model.norm.weight",
    "base_model.model.lm_head.weight",
    "base_model.model.model.embed_tokens.weight",
    "prompt_embeddings",
    "base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight",
    "base_model.model.model.layers.0.self_attn.o_proj.lora_A.weight",
]


@pytest.mark.parametrize("name", ["lora", "dora", "adalora", "loha", "lokr", "lora_bias"])
def test_a_stray_tensor_is_refused_by_name(name: str, decoder: Decoder, copy: Callable[[str], Path]) -> None:
    root = copy(name)
    tensors = load_file(root / WEIGHTS)
    tensors = {key: value for key, value in tensors.items() if ".layers.0.self_attn.o_proj." not in key}
    config = json.loads((root / CONFIG).read_text())
    (root / CONFIG).write_text(json.dumps(config | {"exclude_modules": r"model\.layers\.0\.self_attn\.o_proj"}))
    save_file(tensors, root / WEIGHTS)
    load(decoder, root)
    for stray in STRAY:
        if stray not in tensors:
            save_file(tensors | {stray: torch.zeros(4, 64)}, root / WEIGHTS)
            said = refusal(decoder, root)
            assert repr(stray) in said or (name == "lokr" and stray.rpartition(".")[2] in said), stray


@pytest.mark.parametrize("name", [name for name in ZOO if name not in BIASED])
def test_a_tensor_that_is_missing_is_named(name: str, decoder: Decoder, copy: Callable[[str], Path]) -> None:
    root = copy(name)
    tensors = load_file(root / WEIGHTS)
    prefix = next(key for key in tensors if "base_layer" not in key)
    module = next(key for key in prefix.split(".") if key.endswith(("_proj", "_tokens", "_head", "norm")))
    for missing in [key for key in tensors if f".{module}." in key and "base_layer" not in key][:4]:
        left = {key: value for key, value in tensors.items() if key != missing}
        save_file(left, root / WEIGHTS)
        said = refusal(decoder, root)
        assert module in said, missing
        assert " has no " in said, missing


STRAY_BESIDE_NORMS = {  # with "post_attention_layernorm" in modules_to_save
    f"{NORM}.weight": "replaces a whole module",
    "base_model.model.model.norm.weight": "replaces a whole module",
    "base_model.model.model.layers.9.post_attention_layernorm.weight": "the model has no module",
    "base_model.model.model.layers.0.post_attention_layernorm.bias": "of the model has no bias",
    "base_model.model.model.layers.0.post_attention_layernorm.lokr_w1": "does not target",
    "base_model.model.model.layers.0.post_attention_layernorm.modules_to_save.weight": "has no use beside",
    "base_model.model.model.layers.0.post_attention_layernorm.scale": "belongs to no format",
    "base_model.model.model.layers.0.self_attn.q_norm.weight": "the model has no module",
}


def test_a_stray_tensor_beside_norms_is_refused_by_name(decoder: Decoder, copy: Callable[[str], Path]) -> None:
    root = copy("some norms")
    tensors = load_file(root / WEIGHTS)
    for stray, reason in STRAY_BESIDE_NORMS.items():
        save_file(tensors | {stray: torch.ones(64)}, root / WEIGHTS)
        said = refusal(decoder, root)
        assert repr(stray) in said, stray
        assert reason in said, stray
    weight = "base_model.model.model.layers.2.post_attention_layernorm.weight"
    for shape in ((63,), (64, 1), (1, 64), ()):
        save_file(tensors | {weight: torch.ones(shape)}, root / WEIGHTS)
        assert f"{weight!r} has shape {list(shape)}, expected [64]" in refusal(decoder, root)


def test_norms_are_those_that_modules_to_save_means(decoder: Decoder, copy: Callable[[str], Path]) -> None:
    root = copy("all norms")
    assert sum("norm.weight" in name for name in load_file(root / WEIGHTS)) == 7  # PEFT takes whatever ends so
    held = load(decoder, root)
    assert held.footprint.pages == {"down": 1, "norms.full": 1}
    assert set(held.targets) == {"down_proj", "input_layernorm", "norm", "post_attention_layernorm"}
    store = AdapterStore(decoder.sites, torch.float32, max_rank=None, targets=["down_proj"])
    with pytest.raises(AdapterError, match=r"targets input_layernorm, norm, .*--lora-target-modules down_proj"):
        store.load(1, "fox", root)
    config = json.loads((root / CONFIG).read_text())
    (root / CONFIG).write_text(json.dumps(config | {"modules_to_save": ["norm", "rotary_emb"]}))
    assert "modules_to_save names 'rotary_emb', which has no tensor" in refusal(decoder, root)
    (root / CONFIG).write_text(json.dumps(config | {"target_modules": ["down_proj", "norm"]}))
    assert "the model has no module 'norm'" in refusal(decoder, root)


@pytest.mark.parametrize("name", ["dora", "adalora", "loha", "lokr", "lora_bias", "bias all", "all norms"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_named(
    name: str, bad: float, decoder: Decoder, copy: Callable[[str], Path]
) -> None:
    root = copy(name)
    tensors = load_file(root / WEIGHTS)
    spoiled = max(tensors, key=lambda key: (key.endswith(("vector", "lora_E", "bias", "w2_b", "norm.weight")), key))
    tensors[spoiled].view(-1)[-1] = bad
    save_file(tensors, root / WEIGHTS)
    assert f"tensor {spoiled!r} holds NaN or infinity" in refusal(decoder, root)


def test_biases_can_be_forbidden(zoo: dict[str, Path], decoder: Decoder) -> None:
    for name in ("lora_bias", *BIASED):
        assert "--no-enable-lora-bias" in refusal(decoder, zoo[name], biases=False)
    load(decoder, zoo["dora"], biases=False)


# ---------------------------------------------------------------------------------------------------- dialects


DIALECTS: dict[str, Callable[[str], str]] = {
    "the adapter's name": lambda key: re.sub(r"\.((lora|hada|lokr)_\w+)", r".\1.my", key),
    "the magnitude's weight": lambda key: re.sub(r"vector$", "vector.default.weight", key),
    "no prefix": lambda key: key.removeprefix("base_model.model."),
    "the bare model": lambda key: key.replace("base_model.model.model.", "base_model.model."),
    "a wrapped module": lambda key: key.replace("base_model.model.", "module."),
    "a multimodal model": lambda key: key.replace("base_model.model.model.", "base_model.model.model.language_model."),
    "an older multimodal model": lambda key: key.replace("base_model.model.", "base_model.model.language_model."),
    "biases beside the module": lambda key: key.replace(".base_layer.bias", ".bias"),
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_other_names_of_the_same_tensors(dialect: str, zoo: dict[str, Path], decoder: Decoder, tmp_path: Path) -> None:
    for name, root in zoo.items():
        other = Path(shutil.copytree(root, tmp_path / name))
        save_file({DIALECTS[dialect](key): value for key, value in load_file(root / WEIGHTS).items()}, other / WEIGHTS)
        ours, theirs = load(decoder, other), load(decoder, root)
        assert ours.deltas.keys() == theirs.deltas.keys()
        for site, slices in theirs.deltas.items():
            for one, two in zip(ours.deltas[site], slices, strict=True):
                if two is not None:
                    parts = ((one.a, two.a), (one.b, two.b), (one.gain, two.gain), (one.bias, two.bias))
                    assert all(torch.equal(x, y) if y is not None else x is None for x, y in parts)


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_fused_module_lands_on_all_its_slices(use_dora: bool, decoder: Decoder, tmp_path: Path) -> None:
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
    adapter = load(decoder, tmp_path)
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


def test_shards_with_an_index(decoder: Decoder, copy: Callable[[str], Path], zoo: dict[str, Path]) -> None:
    root = copy("dora")
    tensors = load_file(root / WEIGHTS)
    (root / WEIGHTS).unlink()
    where = {key: f"adapter_model-0000{number % 2}.safetensors" for number, key in enumerate(sorted(tensors))}
    for file in sorted(set(where.values())):
        save_file({key: value for key, value in tensors.items() if where[key] == file}, root / file)
    (root / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": where}))
    ours, theirs = load(decoder, root), load(decoder, zoo["dora"])
    for site, slices in theirs.deltas.items():
        for one, two in zip(ours.deltas[site], slices, strict=True):
            assert torch.equal(one.a, two.a)
            assert torch.equal(one.gain, two.gain)


def test_the_bases_own_embedding_may_be_there_but_no_other(decoder: Decoder, copy: Callable[[str], Path]) -> None:
    root = copy("embedding")
    tensors = load_file(root / WEIGHTS)
    (saved,) = (key for key in tensors if "base_layer" in key)
    tensors[saved][17, 3] += 1
    save_file(tensors, root / WEIGHTS)
    assert repr(saved) in refusal(decoder, root)


def test_in_bfloat16_a_gain_is_as_good_as_in_float32(model: Path, zoo: dict[str, Path], decoder: Decoder) -> None:
    half = load_model(model, read_model_config(model), device=torch.device("cpu"), dtype=torch.bfloat16)
    ours, theirs = load(half, zoo["dora"], torch.bfloat16), load(decoder, zoo["dora"])
    for site, slices in theirs.deltas.items():
        for one, two in zip(ours.deltas[site], slices, strict=True):
            torch.testing.assert_close(one.gain, two.gain, atol=0, rtol=2e-3)  # W itself has 8 bits here
