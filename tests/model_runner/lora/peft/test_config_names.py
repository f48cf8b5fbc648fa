"""What a config names and the model has not is logged; names of multimodal models and of wrappers are understood."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures.adapters.lora_sites import plain_tensors, random_sites, write_adapter
from fixtures.adapters.refusals import load
from safetensors.torch import load_file, save_file

SITES = random_sites()
TARGETS = ["q_proj", "down_proj"]
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
WRAPPED = "base_model.model.model.language_model."


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "fox", plain_tensors(SITES, TARGETS), target_modules=TARGETS)


def edit(root: Path, fields: dict[str, Any]) -> None:
    path = root / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def rename(root: Path, old: str, new: str) -> None:
    save_file({name.replace(old, new): tensor for name, tensor in load_file(root / WEIGHTS).items()}, root / WEIGHTS)


NOTED: dict[str, tuple[dict[str, Any], str]] = {
    "targets of other families": (
        {"target_modules": ["qkv_proj", "c_attn", *TARGETS, "query_key_value"]},
        "target_modules names what the model has not ('qkv_proj', 'c_attn', 'query_key_value')",
    ),
    "a target without tensors": (
        {"target_modules": [*TARGETS, "o_proj"]},
        "2 of the targeted modules have no tensors and are the base's",
    ),
    "a classifier": (
        {"modules_to_save": ["score", "classifier"]},
        "modules_to_save names what has no tensors ('score', 'classifier')",
    ),
    "parameters": (
        {"target_parameters": ["mlp.experts.gate_up_proj"]},
        "target_parameters names what the model has not ('mlp.experts.gate_up_proj')",
    ),
    "trained tokens": (
        {"trainable_token_indices": {"embed_tokens": [3]}},
        "trainable_token_indices means embed_tokens",
    ),
    "the task of an encoder": ({"task_type": "SEQ_2_SEQ_LM"}, "task_type='SEQ_2_SEQ_LM' is served as CAUSAL_LM"),
    "the task of a classifier": ({"task_type": "SEQ_CLS"}, "task_type='SEQ_CLS' is served as CAUSAL_LM"),
}


@pytest.mark.parametrize("case", NOTED)
def test_name_that_the_model_has_not_is_a_log_line(case: str, root: Path, caplog: pytest.LogCaptureFixture) -> None:
    fields, says = NOTED[case]
    plain = load(SITES, root)
    caplog.clear()
    edit(root, fields)
    noted = load(SITES, root)
    assert [record.getMessage() for record in caplog.records if says in record.getMessage()] != []
    assert {name: [one and one.rank for one in slices] for name, slices in noted.deltas.items()} == {
        name: [one and one.rank for one in slices] for name, slices in plain.deltas.items()
    }


@pytest.mark.parametrize("fields", [{"target_modules": None}, {"target_modules": "all-linear"}])
def test_targets_are_those_with_tensors(fields: dict[str, Any], root: Path) -> None:
    edit(root, fields)
    assert load(SITES, root).targets == sorted(TARGETS)


SPELLINGS: dict[str, Any] = {
    "an expression of ms-swift": r"^(language_model|model\.language_model)(?=\.).*\.(q_proj|down_proj)$",
    "an expression of LLaMA-Factory": r"^(?!.*(?:visual|patch_embed)).*(?:q_proj|down_proj).*",
    "an expression of unsloth": (
        r"(?:.*?(?:vision|image|visual|patch|language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)"
        r".*?(?:q_proj|down_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|down_proj)))"
    ),
    "full names": [
        f"model.language_model.layers.{layer}.{name}"
        for layer in (0, 1)
        for name in ("self_attn.q_proj", "mlp.down_proj")
    ],
    "full names of an older model": [
        f"language_model.model.layers.{layer}.{name}"
        for layer in (0, 1)
        for name in ("self_attn.q_proj", "mlp.down_proj")
    ],
    "names": TARGETS,
}


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("case", SPELLINGS)
def test_names_inside_of_a_multimodal_model_match(case: str, wrapped: bool, root: Path) -> None:
    edit(root, {"target_modules": SPELLINGS[case]})
    if wrapped:
        rename(root, "base_model.model.model.", WRAPPED)
    assert load(SITES, root).targets == sorted(TARGETS)


def test_patterns_of_a_multimodal_model_match(root: Path) -> None:
    plain = load(SITES, root)
    key = "model.language_model.layers.0.self_attn.q_proj"
    edit(root, {"alpha_pattern": {key: 80}, "target_modules": r"^model\.language_model.*\.(q_proj|down_proj)"})
    scaled = load(SITES, root)
    one, two = plain.deltas["layers.0.qkv"][0], scaled.deltas["layers.0.qkv"][0]
    other = plain.deltas["layers.1.qkv"][0], scaled.deltas["layers.1.qkv"][0]
    assert one is not None
    assert two is not None
    assert torch.equal(one.b * 10, two.b)
    assert other[0] is not None
    assert other[1] is not None
    assert torch.equal(other[0].b, other[1].b)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (PREFIX, "_orig_mod.base_model.model."),
        (PREFIX, "base_model.model._orig_mod."),
        (".self_attn.", "._checkpoint_wrapped_module.self_attn."),
        (PREFIX, "module._fsdp_wrapped_module."),
        ("base_model.model.model.", "base_model.model.model.text_model."),
    ],
)
def test_names_of_wrappers_are_transparent(old: str, new: str, root: Path) -> None:
    rename(root, old, new)
    assert load(SITES, root).targets == sorted(TARGETS)
