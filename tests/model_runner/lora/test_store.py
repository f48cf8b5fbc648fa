"""The store of adapters on the host: limits, identity, and which adapters are kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from fixtures.adapters.lora_sites import plain_tensors, random_sites, write_adapter
from safetensors.torch import load_file, save_file

from engine.errors import AdapterError
from engine.messages import Footprint
from model_runner.lora.files.tensor_file import TensorFile
from model_runner.lora.store import AdapterStore

SITES = random_sites()
TARGETS = ["q_proj", "v_proj", "down_proj"]


def store(max_rank: int | None = None, targets: list[str] | None = None) -> AdapterStore:
    return AdapterStore(SITES, torch.float32, max_rank=max_rank, targets=targets)


def adapter_dir(root: Path, rank: int = 4, **config: object) -> Path:
    return write_adapter(root, plain_tensors(SITES, TARGETS, rank), target_modules=TARGETS, **{"r": rank, **config})


def test_store_reads_rank_targets_footprint_and_bytes(tmp_path: Path) -> None:
    adapter = store().load(3, "cat", adapter_dir(tmp_path / "cat", rank=17))
    assert (adapter.adapter_id, adapter.name, adapter.rank) == (3, "cat", 17)
    assert adapter.targets == ["down_proj", "q_proj", "v_proj"]
    assert adapter.footprint == Footprint(pages={"qkv": 2, "down": 2})
    floats = 17 * sum(
        site.in_features + piece.width for site in SITES for piece in site.slices if piece.module in TARGETS
    )
    assert adapter.bytes == 4 * floats


def test_group_pages_follow_its_highest_rank(tmp_path: Path) -> None:
    tensors = plain_tensors(SITES, ["q_proj", "v_proj"]) | plain_tensors(SITES, ["down_proj"], 33)
    root = write_adapter(tmp_path, tensors, target_modules=TARGETS, rank_pattern={"down_proj": 33})
    assert store().load(1, "cat", root).footprint == Footprint(pages={"qkv": 1, "down": 3})


@pytest.mark.parametrize("layer", [0, 1])
def test_highest_rank_of_any_layer_decides_the_pages(layer: int, tmp_path: Path) -> None:
    deep = {name: value for name, value in plain_tensors(SITES, ["o_proj"], 40).items() if f"layers.{layer}." in name}
    tensors = plain_tensors(SITES, ["o_proj"]) | deep
    pattern = {f"layers.{layer}.self_attn.o_proj": 40}
    root = write_adapter(tmp_path, tensors, target_modules=["o_proj"], rank_pattern=pattern)
    assert store().load(1, "cat", root).footprint == Footprint(pages={"o": 3})


def test_loading_twice_returns_the_same_adapter(tmp_path: Path) -> None:
    root = adapter_dir(tmp_path)
    host = store()
    assert host.load(1, "cat", root) is host.load(1, "cat", root)
    assert len(host) == 1


def test_store_keeps_and_drops_adapters(tmp_path: Path) -> None:
    host = store()
    cat = host.load(1, "cat", adapter_dir(tmp_path))
    assert host.get(1) is cat
    assert list(host) == [cat]
    host.drop(1)
    host.drop(1)
    assert host.get(1) is None
    assert list(host) == []


def test_refused_adapter_is_not_kept(tmp_path: Path) -> None:
    host = store(max_rank=2)
    with pytest.raises(AdapterError):
        host.load(1, "cat", adapter_dir(tmp_path))
    assert host.get(1) is None


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_files_outside_of_the_roots_are_refused(name: str, tmp_path: Path) -> None:
    roots, host = [str(tmp_path / "root")], store()
    root, outside = adapter_dir(tmp_path / "root" / "cat"), adapter_dir(tmp_path / "outside")
    assert host.load(1, "cat", root, roots=roots).revision == host.load(2, "cat", outside).revision
    (root / name).unlink()
    (root / name).symlink_to(outside / name)
    with pytest.raises(AdapterError, match=f"adapter 'cat': {name}: lies outside of --lora-root"):
        host.load(3, "cat", root, roots=roots)
    for path in (root, outside):
        with pytest.raises(AdapterError, match="lies outside of --lora-root"):
            host.survey("cat", path, roots)
    assert host.load(3, "cat", root).rank == 4


def test_two_names_of_equal_files_share_their_deltas(tmp_path: Path) -> None:
    host = store()
    root = adapter_dir(tmp_path)
    one, two = host.load(1, "one", root), host.load(2, "two", root)
    assert one.revision == two.revision
    assert one.deltas is two.deltas


def test_revision_depends_on_bytes_and_scaling_options(tmp_path: Path) -> None:
    root = adapter_dir(tmp_path)
    first = store().load(1, "x", root).revision
    assert len(first) == 64
    path = root / "adapter_config.json"
    original = path.read_text()
    for change in ({"lora_alpha": 9}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 2}}):
        path.write_text(json.dumps(json.loads(original) | change))
        assert store().load(1, "x", root).revision != first
    for same in ({"lora_dropout": 0.5}, {"base_model_name_or_path": "elsewhere"}, {"inference_mode": True}):
        path.write_text(json.dumps(json.loads(original) | same))
        assert store().load(1, "x", root).revision == first
    weights = load_file(root / "adapter_model.safetensors")
    next(iter(weights.values()))[0, 0] += 1
    save_file(weights, root / "adapter_model.safetensors")
    assert store().load(1, "x", root).revision != first


def test_changed_files_are_refused_for_an_expected_revision(tmp_path: Path) -> None:
    root = adapter_dir(tmp_path)
    revision = store().load(1, "cat", root).revision
    assert store().load(1, "cat", root, revision).revision == revision
    with pytest.raises(AdapterError, match=r"adapter 'cat': .*have changed"):
        store().load(1, "cat", root, "0" * 64)


def test_rank_limit_names_its_flag_before_data_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = adapter_dir(tmp_path, rank=17)
    assert store(max_rank=17).load(1, "cat", root).rank == 17
    monkeypatch.setattr(TensorFile, "tensors", lambda *_: pytest.fail("the data was read"))
    with pytest.raises(AdapterError, match="adapter 'cat': rank 17 is above --max-lora-rank 16"):
        store(max_rank=16).load(1, "cat", root)


def test_target_limit_names_its_flag(tmp_path: Path) -> None:
    root = adapter_dir(tmp_path)
    store(targets=["all"]).load(1, "cat", root)
    store(targets=[*TARGETS, "o_proj"]).load(1, "cat", root)
    with pytest.raises(AdapterError, match="down_proj, v_proj, which --lora-target-modules q_proj o_proj"):
        store(targets=["q_proj", "o_proj"]).load(1, "cat", root)


def test_sharded_adapter_equals_the_unsharded_one(tmp_path: Path) -> None:
    root = adapter_dir(tmp_path)
    whole = store().load(1, "whole", root)
    tensors = load_file(root / "adapter_model.safetensors")
    (root / "adapter_model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"adapter_model-1.safetensors": names[::2], "adapter_model-2.safetensors": names[1::2]}
    for part, held in parts.items():
        save_file({name: tensors[name] for name in held}, root / part)
    index = {"metadata": {}, "weight_map": {name: part for part, held in parts.items() for name in held}}
    (root / "adapter_model.safetensors.index.json").write_text(json.dumps(index))
    sharded = store().load(2, "sharded", root)
    for name, slices in whole.deltas.items():
        for ours, theirs in zip(slices, sharded.deltas[name], strict=True):
            assert (ours is None and theirs is None) or (ours and theirs and torch.equal(ours.b, theirs.b))
