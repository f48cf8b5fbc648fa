"""mlx-lm's adapters become what PEFT's adapters of the same matrices become, tensor by tensor."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from fixtures.adapters.adapter_zoo import save
from fixtures.adapters.expert_adapters import make_expert_adapter
from fixtures.adapters.refusals import load, refusal
from fixtures.adapters.trainers.mlx import as_mlx
from safetensors.torch import load_file, save_file

from model_runner.lora.normal_form import NormalForm
from model_runner.model.decoders.decoder import Decoder


def same(one: NormalForm, two: NormalForm) -> bool:
    """Returns whether two adapters are equal but for rounding."""
    if one.deltas.keys() != two.deltas.keys():
        return False
    for site, slices in one.deltas.items():
        for left, right in zip(slices, two.deltas[site], strict=True):
            assert (left is None) == (right is None)
            if left is None or right is None:
                continue
            torch.testing.assert_close(left.b.t() @ left.a, right.b.t() @ right.a, rtol=1e-5, atol=1e-6)
            if left.gain is not None or right.gain is not None:
                torch.testing.assert_close(left.gain, right.gain)
    return True


def peft(**options: Any) -> Any:
    import peft

    return peft.LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "lora_alpha": 8, **options})


KINDS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": ["q_proj", "v_proj", "down_proj"], "lora_alpha": 80},
    "dora": {"target_modules": ["q_proj", "o_proj", "up_proj"], "use_dora": True, "r": 9},
    "layers": {"target_modules": ["k_proj"], "layers_to_transform": [1, 2]},
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_mlx_adapter_equals_pefts(kind: str, model: Path, decoder: Decoder, tmp_path: Path) -> None:
    saved = save(model, tmp_path / "peft", peft(**KINDS[kind]))
    ours = load(decoder.sites, as_mlx(saved, tmp_path / "mlx"))
    assert same(ours, load(decoder.sites, saved))


def test_old_alpha_multiplies_the_scale(model: Path, decoder: Decoder, tmp_path: Path) -> None:
    saved = save(model, tmp_path / "peft", peft(target_modules=["q_proj"]))
    ours = as_mlx(saved, tmp_path / "mlx")
    config = json.loads((ours / "adapter_config.json").read_text())
    config["lora_parameters"] |= {"alpha": 16, "scale": 0.5}  # 0.5 * 16 / 4 is PEFT's 8 / 4
    (ours / "adapter_config.json").write_text(json.dumps(config))
    assert same(load(decoder.sites, ours), load(decoder.sites, saved))


def test_tied_embedding_changes_the_head_too(
    tiny_model: Callable[[str], Path], decoder_of: Callable[[str], Decoder], tmp_path: Path
) -> None:
    saved = save(tiny_model("llama3"), tmp_path / "peft", peft(target_modules=["embed_tokens", "q_proj"]))
    adapter = load(decoder_of("llama3").sites, as_mlx(saved, tmp_path / "mlx"))
    embedding, head = (adapter.deltas[name][0] for name in ("embed", "head"))
    assert embedding is not None
    assert head is not None
    torch.testing.assert_close(embedding.a.t() @ embedding.b, head.b.t() @ head.a)


@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe"])
def test_stacked_experts_are_split(
    family: str, tiny_model: Callable[[str], Path], decoder_of: Callable[[str], Decoder], tmp_path: Path
) -> None:
    names = ["w1", "w2", "w3"] if family == "mixtral" else ["gate_proj", "up_proj", "down_proj"]
    saved = make_expert_adapter(tiny_model(family), tmp_path / "peft", [*names, "q_proj"])
    sites = decoder_of(family).sites
    assert same(load(sites, as_mlx(saved, tmp_path / "mlx")), load(sites, saved))


def test_empty_stack_of_too_many_experts_is_refused(model: Path, decoder: Decoder, tmp_path: Path) -> None:
    ours = as_mlx(save(model, tmp_path / "peft", peft(target_modules=["q_proj"])), tmp_path / "mlx")
    weights = ours / "adapters.safetensors"
    name = "model.layers.0.mlp.switch_mlp.gate_proj.lora_a"
    save_file(load_file(weights) | {name: torch.ones(100_000, 0, 0)}, weights)
    assert f"tensor '{name}' has 100000 experts, and the model has fewer" in refusal(decoder.sites, ours)


def test_full_fine_tune_is_refused_by_its_kind(model: Path, decoder: Decoder, tmp_path: Path) -> None:
    ours = as_mlx(save(model, tmp_path / "peft", peft(target_modules=["q_proj"])), tmp_path / "mlx")
    config = json.loads((ours / "adapter_config.json").read_text())
    (ours / "adapter_config.json").write_text(json.dumps(config | {"fine_tune_type": "full"}))
    assert 'fine_tune_type="full" of mlx-lm is no adapter' in refusal(decoder.sites, ours)


def test_old_weights_are_refused_with_a_conversion(model: Path, decoder: Decoder, tmp_path: Path) -> None:
    saved = save(model, tmp_path / "peft", peft(target_modules=["q_proj"]))
    ours = as_mlx(saved, tmp_path / "mlx")
    weights = ours / "adapters.safetensors"
    numpy.savez(ours / "adapters.npz", **{name: tensor.numpy() for name, tensor in load_file(weights).items()})
    weights.unlink()
    command = refusal(decoder.sites, ours).partition("run in its directory: ")[2]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(command, shell=True, cwd=ours, env={**os.environ, "PATH": path}, check=True, timeout=120)
    assert same(load(decoder.sites, ours), load(decoder.sites, saved))


def test_tensor_of_another_kind_is_refused_by_name(model: Path, decoder: Decoder, tmp_path: Path) -> None:
    ours = as_mlx(save(model, tmp_path / "peft", peft(target_modules=["q_proj"])), tmp_path / "mlx")
    weights = ours / "adapters.safetensors"
    save_file(load_file(weights) | {"model.layers.0.self_attn.q_proj.weight": torch.ones(4)}, weights)
    assert "'model.layers.0.self_attn.q_proj.weight' is none of mlx-lm's" in refusal(decoder.sites, ours)
