"""Broken configs and tensors: each is refused in one line that names the adapter and the part at fault."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures.adapters.lora_sites import plain_tensors, random_sites, write_adapter
from fixtures.adapters.refusals import load, refusal
from safetensors.torch import load_file, save_file

SITES = random_sites()
TARGETS = ["q_proj", "down_proj"]
INDEX = "adapter_model.safetensors.index.json"
Q_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
Q_B = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "fox", plain_tensors(SITES, TARGETS), target_modules=TARGETS)


def test_unbroken_adapter_loads(root: Path) -> None:
    load(SITES, root)


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "another type": ({"peft_type": "IA3"}, 'peft_type="IA3"'),
    "rank 0": ({"r": 0}, "r=0"),
    "rank 513": ({"r": 513}, "r=513"),
    "rank as text": ({"r": "4"}, "$.r"),
    "pattern rank": ({"rank_pattern": {"q_proj": -1}}, "rank_pattern['q_proj']=-1"),
    "alpha 0": ({"lora_alpha": 0}, "lora_alpha=0"),
    "alpha below 0": ({"lora_alpha": -16}, "lora_alpha=-16"),
    "long-context LoRA": ({"long_lora_max_len": 4096}, "long_lora_max_len=4096"),
    "tensorizer": ({"tensorizer_config_dict": {"a": 1}}, "tensorizer_config_dict"),
    "pattern alpha 0": ({"alpha_pattern": {"q_proj": 0}}, "alpha_pattern['q_proj']=0"),
    "bias": ({"bias": "some"}, 'bias="some"'),
    "dora": ({"use_dora": True}, "lora_magnitude_vector"),
    "dora with lora_bias": ({"use_dora": True, "lora_bias": True}, "lora_bias=true"),
    "lora_bias": ({"lora_bias": True}, "lora_B.bias"),
    "another type's option": ({"init_r": 12}, "init_r=12"),
    "another type's pattern": ({"rank_pattern": {"q_proj": [True]}}, "rank_pattern['q_proj']=[true]"),
    "qalora": ({"use_qalora": True}, "use_qalora=true"),
    "megatron": ({"megatron_config": {"a": 1}}, "megatron_config"),
    "bdlora": ({"use_bdlora": {"nblocks": 2}}, "use_bdlora"),
    "arrow": ({"arrow_config": {"top_k": 2}}, "arrow_config"),
    "kasa": ({"kasa_config": {"beta": 1}}, "kasa_config"),
    "monteclora": ({"monteclora_config": {"x": 1}}, "monteclora_config"),
    "loftq": ({"init_lora_weights": "loftq"}, 'init_lora_weights="loftq"'),
    "pissa_niter": ({"init_lora_weights": "pissa_niter_16"}, 'init_lora_weights="pissa_niter_16"'),
    "lora_ga": ({"init_lora_weights": "lora_ga"}, 'init_lora_weights="lora_ga"'),
    "corda": ({"init_lora_weights": "corda"}, 'init_lora_weights="corda"'),
    "a stranger": ({"use_tomorrow": True}, "use_tomorrow=true"),
    "no targets": ({"target_modules": []}, "target_modules=[] names no module"),
    "empty targets": ({"target_modules": []}, "target_modules=[]"),
    "unknown targets": ({"target_modules": ["query", "wq"]}, "the model has no module 'query', 'wq'"),
    "regex without match": ({"target_modules": "nothing.*"}, "'nothing.*'"),
    "broken regex": ({"target_modules": "(q_proj"}, "'(q_proj'"),
    "broken pattern": ({"rank_pattern": {"[": 3}}, "rank_pattern"),
    "everything excluded": ({"exclude_modules": TARGETS}, "exclude_modules"),
    "regex with layers": ({"target_modules": ".*q_proj", "layers_to_transform": [0]}, "layers_to_transform"),
    "pattern without layers": ({"layers_pattern": "layers"}, 'layers_pattern="layers"'),
    "only targets without tensors": ({"target_modules": ["o_proj"]}, "none of the modules"),
    "tensors without a target": ({"target_modules": ["q_proj"]}, "model.layers.0.mlp.down_proj"),
    "tensors of other layers": ({"layers_to_transform": [0]}, "does not target model.layers.1."),
    "another rank": ({"r": 5}, "expected [5, 24]"),
    "another pattern rank": ({"rank_pattern": {"q_proj": 3}}, "expected [3, 24]"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_broken_config_is_refused_by_option(case: str, root: Path) -> None:
    fields, named = CONFIGS[case]
    path = root / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    assert named in refusal(SITES, root)


@pytest.mark.parametrize("empty", [None, False, {}, [], ""])
def test_empty_unknown_option_is_ignored(empty: object, root: Path) -> None:
    path = root / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_tomorrow": empty}))
    load(SITES, root)


def change(tensors: dict[str, torch.Tensor], case: str) -> str:
    """Breaks the tensors. Returns the text that the error message must contain."""
    value = tensors[Q_A]
    if case == "no A":
        del tensors[Q_A]
        return "has no lora_A"
    if case == "no B":
        del tensors[Q_B]
        return "has no lora_B"
    changes: dict[str, tuple[str, torch.Tensor]] = {
        "unknown module": (Q_A.replace("q_proj", "qq_proj"), value),
        "unknown layer": (Q_A.replace("layers.0", "layers.9"), value),
        "base weight": ("base_model.model.lm_head.weight", value),
        "head": ("base_model.model.lm_head.lora_A.weight", value),
        "magnitude": (Q_A.replace("lora_A.weight", "lora_magnitude_vector"), value),
        "embedding": ("base_model.model.model.embed_tokens.lora_embedding_A", value),
        "bias": (Q_B.replace("weight", "bias"), value),
        "twice": (Q_A.replace("lora_A", "lora_A.default"), value),
        "newline": ("base_model\nevil.lora_A.weight", value),
        "long": ("x" * 5000, value),
        "wrong shape": (Q_A, value[:, :-1]),
        "a vector": (Q_A, value.flatten()),
        "transposed": (Q_B, tensors[Q_B].t()),
        "integers": (Q_A, value.to(torch.int8)),
        "float8": (Q_A, value.to(torch.float8_e4m3fn)),
        "nan": (Q_A, torch.full_like(value, math.nan)),
        "infinity": (Q_B, torch.full_like(tensors[Q_B], math.inf)),
    }
    name, tensor = changes[case]
    tensors[name] = tensor.clone()
    return repr(name if len(name) <= 200 else name[:197] + "...")


TENSOR_CASES = [
    *("no A", "no B", "twice", "newline", "long"),
    *("unknown module", "unknown layer", "base weight", "head", "magnitude", "embedding", "bias"),
    *("wrong shape", "a vector", "transposed", "integers", "float8", "nan", "infinity"),
]


@pytest.mark.parametrize("case", TENSOR_CASES)
def test_broken_tensor_is_refused_by_name(case: str, root: Path) -> None:
    path = root / "adapter_model.safetensors"
    tensors = load_file(path)
    named = change(tensors, case)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    assert named in refusal(SITES, root)


def test_shape_error_says_got_and_expected(root: Path) -> None:
    path = root / "adapter_model.safetensors"
    save_file(load_file(path) | {Q_A: torch.zeros(4, 23)}, path)
    message = refusal(SITES, root)
    assert "[4, 23]" in message
    assert "[4, 24]" in message


def test_values_too_large_for_the_serving_dtype_are_refused(root: Path) -> None:
    path = root / "adapter_model.safetensors"
    save_file(load_file(path) | {Q_B: torch.full((32, 4), 40_000.0)}, path)  # alpha / r = 2
    load(SITES, root)
    assert f"'{Q_B}' holds values too large for torch.float16" in refusal(SITES, root, torch.float16)
