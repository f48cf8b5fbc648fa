"""The same adapter with the tensor names that other versions of PEFT write."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fixtures.adapters.refusals import load
from safetensors.torch import load_file, save_file

from model_runner.model.decoders.decoder import Decoder

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


pytestmark = [
    pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`"),
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed"),
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match"),  # AdaLoRA's are module names
]


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
def test_other_tensor_names_give_the_same_adapter(
    dialect: str, zoo: dict[str, Path], decoder: Decoder, tmp_path: Path
) -> None:
    for name, root in zoo.items():
        other = Path(shutil.copytree(root, tmp_path / name))
        save_file({DIALECTS[dialect](key): value for key, value in load_file(root / WEIGHTS).items()}, other / WEIGHTS)
        ours, theirs = load(decoder.sites, other), load(decoder.sites, root)
        assert ours.deltas.keys() == theirs.deltas.keys()
        for site, slices in theirs.deltas.items():
            for one, two in zip(ours.deltas[site], slices, strict=True):
                if two is not None:
                    parts = ((one.a, two.a), (one.b, two.b), (one.gain, two.gain), (one.bias, two.bias))
                    assert all(torch.equal(x, y) if y is not None else x is None for x, y in parts)
