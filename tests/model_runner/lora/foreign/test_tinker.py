"""tinker's own name of the head, which is trained beside "all-linear"."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import peft
import torch
from fixtures.adapters.adapter_zoo import save
from fixtures.adapters.refusals import load
from safetensors.torch import load_file, save_file

from model_runner.model.decoders.decoder import Decoder

WEIGHTS = "adapter_model.safetensors"


def test_head_under_tinkers_name_is_the_head(model: Path, decoder: Decoder, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", target_modules=["lm_head", "q_proj"])
    saved = save(model, tmp_path / "peft", config)
    root = Path(shutil.copytree(saved, tmp_path / "tinker"))
    tensors = {name: tensor for name, tensor in load_file(root / WEIGHTS).items() if "base_layer" not in name}
    named = {name.replace("model.lm_head", "model.model.unembed_tokens"): tensor for name, tensor in tensors.items()}
    assert any("unembed_tokens" in name for name in named)
    save_file(named, root / WEIGHTS)
    fields = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
    (root / "adapter_config.json").write_text(json.dumps(fields))
    ours, theirs = load(decoder.sites, root), load(decoder.sites, saved)
    assert ours.targets == theirs.targets == ["lm_head", "q_proj"]
    one, two = ours.deltas["head"][0], theirs.deltas["head"][0]
    assert one is not None
    assert two is not None
    assert torch.equal(one.a, two.a)
    assert torch.equal(one.b, two.b)
