"""Rotary frequencies against transformers, for every rope type, in old and new config keys; and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.errors import ConfigError
from model_runner.compute.ops.torch_ops import TorchOps
from model_runner.config import read_model_config
from model_runner.config.rope import Rope, inverse_frequencies
from model_runner.model.layers.rotary import Rotary

BASE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 4096,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 256}
YARN = {"factor": 4.0, "original_max_position_embeddings": 1024}

VARIANTS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "null": {"rope_scaling": None, "rope_theta": 5e5},
    "old theta": {"rope_theta": 500000},
    "new theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "new theta wins": {"rope_theta": 3.0e4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "old linear": {"rope_theta": 1e5, "rope_scaling": {"type": "linear", "factor": 3.0}},
    "new linear": {"rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 1e5}},
    "scaling wins": {
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        "rope_parameters": {"rope_type": "default", "rope_theta": 77.0},
    },
    "dynamic": {"rope_scaling": {"type": "dynamic", "factor": 4.0}},
    "llama3": {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
    "llama3 new": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
    "llama3 outer original": {
        "original_max_position_embeddings": 512,
        "rope_scaling": {"rope_type": "llama3", **LLAMA3},
    },
    "yarn": {"rope_scaling": {"type": "yarn", **YARN}, "rope_theta": 1e6},
    "yarn full": {
        "rope_scaling": {"rope_type": "yarn", **YARN, "beta_fast": 20, "beta_slow": 2, "attention_factor": 1.3}
    },
    "yarn mscale": {"rope_scaling": {"rope_type": "yarn", **YARN, "mscale": 0.7, "mscale_all_dim": 1.4}},
    "yarn untruncated": {"rope_scaling": {"rope_type": "yarn", **YARN, "truncate": False}},
}


def write(directory: Path, **fields: Any) -> Path:
    (directory / "config.json").write_text(json.dumps({**BASE, **fields}))
    return directory


@pytest.mark.parametrize("variant", VARIANTS)
def test_frequencies_equal_transformers(variant: str, tmp_path: Path) -> None:
    from transformers import AutoConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = read_model_config(write(tmp_path, **VARIANTS[variant]))
    theirs = LlamaRotaryEmbedding(AutoConfig.from_pretrained(tmp_path))
    rope = config.ropes[0]
    assert rope is not None
    torch.testing.assert_close(inverse_frequencies(rope, config.head_dim), theirs.inv_freq, atol=0, rtol=1e-6)
    assert rope.attention == pytest.approx(theirs.attention_scaling)

    positions = torch.tensor([0, 1, 17, 4000])
    cos, sin = theirs(torch.zeros(1), positions[None])
    ours = Rotary(rope, config.head_dim, torch.device("cpu"), torch.float32)(positions)
    torch.testing.assert_close(ours.cos[:, 0], cos[0, :, : config.head_dim // 2], atol=1e-3, rtol=0)
    torch.testing.assert_close(ours.sin[:, 0], sin[0, :, : config.head_dim // 2], atol=1e-3, rtol=0)


SHORT, LONG = [1.0 + i / 9 for i in range(12)], [1.0 + i for i in range(12)]
LONGROPE = {"short_factor": SHORT, "long_factor": LONG}
PHI_VARIANTS: dict[str, dict[str, Any]] = {
    "su": {"rope_scaling": {"type": "su", **LONGROPE, "original_max_position_embeddings": 512}},
    "yarn, as its first files say": {"rope_scaling": {"type": "yarn", **LONGROPE}},
    "longrope": {"rope_theta": 5e5, "rope_scaling": {"rope_type": "longrope", **LONGROPE, "attention_factor": 1.25}},
    "new": {"rope_parameters": {"rope_type": "longrope", **LONGROPE, "factor": 8.0, "partial_rotary_factor": 0.75}},
    "as long as it was": {"original_max_position_embeddings": 4096, "rope_scaling": {"type": "longrope", **LONGROPE}},
    "partial alone": {},
}


@pytest.mark.parametrize("length", [512, 513])
@pytest.mark.parametrize("variant", PHI_VARIANTS)
def test_longrope_factors_by_context_length(variant: str, length: int, tmp_path: Path) -> None:
    from transformers import AutoConfig
    from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

    fields = {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "partial_rotary_factor": 0.75}
    fields |= {"original_max_position_embeddings": 512, "head_dim": 32}
    config = read_model_config(write(tmp_path, **fields | PHI_VARIANTS[variant])).serving(length)
    theirs = Phi3RotaryEmbedding(AutoConfig.from_pretrained(tmp_path))
    cos, sin = theirs(torch.zeros(1), torch.tensor([[0, 1, 17, length - 1]]))
    rope = config.ropes[0]
    assert rope is not None
    torch.testing.assert_close(inverse_frequencies(rope, 32), theirs.inv_freq, atol=0, rtol=1e-6)
    ours = Rotary(rope, 32, torch.device("cpu"), torch.float32)(torch.tensor([0, 1, 17, length - 1]))
    torch.testing.assert_close(ours.cos[:, 0], cos[0, :, :12], atol=1e-3, rtol=0)
    torch.testing.assert_close(ours.sin[:, 0], sin[0, :, :12], atol=1e-3, rtol=0)


def test_partial_rotation_turns_the_first_dimensions() -> None:
    rotate = Rotary(Rope(rotary_share=0.5), 8, torch.device("cpu"), torch.float32)(torch.tensor([3, 5]))
    heads = torch.arange(48.0).view(2, 3, 8)
    rotated = TorchOps().rope(heads, *rotate)
    assert torch.equal(rotated[..., 4:], heads[..., 4:])
    assert not torch.equal(rotated[..., :4], heads[..., :4])


def test_yarn_extends_an_unchanged_max_length(tmp_path: Path) -> None:
    assert read_model_config(write(tmp_path, **VARIANTS["yarn"])).max_length == 4096
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
    assert read_model_config(write(tmp_path, rope_scaling=scaling)).max_length == 16384
    assert read_model_config(write(tmp_path, **VARIANTS["dynamic"])).max_length == 4096


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "short_factor is missing"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0, 2.0]}}, "long_factor"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [0]}}, "long_factor"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}}, "short_factor has 1 num"),
        ({"rope_scaling": {"type": "longrope", "short_factor": "all"}}, "list of numbers"),
        ({"rope_scaling": {"type": "axial"}}, "axial"),
        ({"rope_scaling": {"type": "default", "mrope_section": [8, 4, 4]}}, "mrope_section"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"rope_scaling": {"type": "linear", "factor": "two"}}, "factor"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ({"rope_scaling": {"rope_type": "llama3", **LLAMA3, "low_freq_factor": 4.0}}, "must differ"),
        ({"rope_scaling": {"type": 3}}, "type"),
        ({"rope_scaling": [1]}, "rope_scaling"),
        ({"rope_theta": -1}, "rope_theta"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "layer types"),
    ],
)
def test_refusals_name_the_field(fields: dict[str, Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=named):
        read_model_config(write(tmp_path, **fields))
