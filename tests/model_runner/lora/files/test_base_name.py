"""The base model that an adapter names, compared with the one that is served: a warning only if their names differ."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from fixtures.adapters.lora_sites import plain_tensors, random_sites, write_adapter

from model_runner.lora.files.base_name import is_same_model
from model_runner.lora.store import AdapterStore

SNAPSHOT = "hub/models--meta-llama--Llama-3.2-1B/snapshots/0a1b2c"

NAMES = [
    ("meta-llama/Llama-3.2-1B", "/models/Llama-3.2-1B", True),
    ("meta-llama/Llama-3.2-1B", "/models/llama-3.2-1b/", True),
    ("/home/me/Llama-3.2-1B/", "/models/Llama-3.2-1B", True),
    ("meta-llama/Llama-3.2-1B", SNAPSHOT, True),
    ("meta-llama/Llama-3.2-1B@main", SNAPSHOT, True),
    ("unsloth/Llama-3.2-1B-bnb-4bit", SNAPSHOT, True),
    ("unsloth/llama-3.2-1b-unsloth-bnb-4bit", SNAPSHOT, True),
    ("mlx-community/Llama-3.2-1B-4bit", SNAPSHOT, True),
    ("meta-llama/Llama-3.2-1B-Instruct", SNAPSHOT, False),
    ("meta-llama/Llama-3.2-3B", SNAPSHOT, False),
    ("Qwen/Qwen3-8B", "/models/base", False),
]


@pytest.mark.parametrize(("named", "served", "same"), NAMES)
def test_only_the_last_part_of_a_name_counts(named: str, served: str, same: bool) -> None:
    assert is_same_model(named, Path(served)) is same


def test_name_in_the_models_config_counts_too(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"_name_or_path": "Qwen/Qwen3-8B"}))
    assert is_same_model("Qwen/Qwen3-8B", tmp_path)
    for content in ("[]", "{", '{"_name_or_path": 3}'):
        (tmp_path / "config.json").write_text(content)
        assert not is_same_model("Qwen/Qwen3-8B", tmp_path)


def test_names_of_the_served_model_count_too() -> None:
    assert is_same_model("Qwen/Qwen3-8B", Path("/model"), ["chat", "qwen3-8b"])
    assert not is_same_model("Qwen/Qwen3-8B", Path("/model"), ["chat"])


def test_another_base_model_is_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sites = random_sites()
    store = AdapterStore(sites, torch.float32, max_rank=None, targets=None, model=tmp_path / "Llama-3.2-1B")
    for number, named in enumerate(("me/Llama-3.2-1B", "me/other")):
        tensors = plain_tensors(sites, ["q_proj"])
        root = write_adapter(tmp_path / named, tensors, target_modules=["q_proj"], base_model_name_or_path=named)
        store.load(number, named, root)
    assert [record.getMessage().partition(", and")[0] for record in caplog.records] == [
        "adapter 'me/other': it was trained on 'me/other'"
    ]
