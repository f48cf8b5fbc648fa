"""Checkpoints: sharded and single files give the same weights, dtypes are cast, and errors name the tensor or file."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fixtures.models.tiny_models import build
from safetensors.torch import load_file, save_file

from engine.errors import ConfigError
from engine.processes.busy_timer import BusyTimer
from model_runner.config import read_model_config
from model_runner.model.decoders.decoder import Decoder
from model_runner.model.layers.weights import Weights
from model_runner.model.load import build_decoder, load_model
from model_runner.platform.shard import Shard
from model_runner.weights.checkpoint import INDEX, SINGLE, Placement, load_checkpoint

TinyModel = Callable[[str], Path]


def load(path: Path, dtype: torch.dtype = torch.float32, *, progress: BusyTimer | None = None) -> Decoder:
    return load_model(path, read_model_config(path), device=torch.device("cpu"), dtype=dtype, progress=progress)


def filled(path: Path) -> dict[str, torch.Tensor]:
    """Returns every tensor that the checkpoint fills, by its name in the files."""
    decoder = build_decoder(read_model_config(path), Weights(torch.device("cpu"), torch.float32, Shard()))
    load_checkpoint(path, decoder.weights.placements)
    return {placement.name: placement.into for placement in decoder.weights.placements}


@pytest.fixture
def copy(tiny_model: TinyModel, tmp_path: Path) -> Path:
    """Copies a llama3 directory (with a tied head), so that a test may change it."""
    shutil.copytree(tiny_model("llama3"), tmp_path / "model")
    return tmp_path / "model"


def spoil(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(directory / SINGLE)
    change(tensors)
    save_file(tensors, directory / SINGLE)


def test_every_tensor_is_copied_to_its_placement(tiny_model: TinyModel) -> None:
    path = tiny_model("qwen2")
    expected, ours = load_file(path / SINGLE), filled(path)
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(ours[name], tensor), name


def test_fused_sites_hold_their_slices_side_by_side(tiny_model: TinyModel) -> None:
    path = tiny_model("llama3")
    tensors, decoder = load_file(path / SINGLE), load(path)
    inside = [site for site in decoder.sites if site.layer >= 0]
    assert [site.name for site in inside[:4]] == [
        "layers.0.qkv",
        "layers.0.o",
        "layers.0.gate_up",
        "layers.0.down",
    ]
    for site in inside:
        for part in site.slices:
            expected = tensors[f"{site.path}.{part.module}.weight"]
            assert torch.equal(site.base.weight[part.start : part.stop], expected)
    assert [part.width for part in inside[0].slices] == [64, 32, 32]
    assert decoder.weight_bytes == sum(tensor.numel() * 4 for tensor in tensors.values())


@pytest.mark.parametrize("family", ["qwen3", "phi3", "mixtral"])
def test_sharded_checkpoint_equals_a_single_file(family: str, tmp_path: Path) -> None:
    whole = build(family, tmp_path / "whole")
    parts = build(family, tmp_path / "parts", max_shard_size="100KB")
    assert (parts / INDEX).is_file()
    assert len(list(parts.glob("*.safetensors"))) > 2
    ours, expected = filled(parts), filled(whole)
    assert list(ours) == list(expected)
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


def test_fused_tensor_is_one_slice(tiny_model: TinyModel) -> None:
    path = tiny_model("phi3")
    tensors, decoder = load_file(path / SINGLE), load(path)
    for site in decoder.sites:
        if site.group in ("qkv", "gate_up"):
            assert [piece.module for piece in site.slices] == [f"{site.group}_proj"]
            assert torch.equal(site.base.weight, tensors[f"{site.path}.{site.group}_proj.weight"])


def test_fused_tensor_of_another_shape_is_named(tiny_model: TinyModel, tmp_path: Path) -> None:
    shutil.copytree(tiny_model("phi3"), tmp_path / "m")
    name = "model.layers.1.self_attn.qkv_proj.weight"
    spoil(tmp_path / "m", lambda tensors: tensors.update({name: tensors[name][:-1].contiguous()}))
    with pytest.raises(ConfigError, match=rf"{name} has shape \[127, 64\].*\[128, 64\]"):
        load(tmp_path / "m")


def test_missing_expert_is_named(tiny_model: TinyModel, tmp_path: Path) -> None:
    shutil.copytree(tiny_model("mixtral"), tmp_path / "m")
    name = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    spoil(tmp_path / "m", lambda tensors: tensors.pop(name))
    with pytest.raises(ConfigError, match=f"no tensor {name}"):
        load(tmp_path / "m")


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_are_cast(stored: torch.dtype, copy: Path) -> None:
    expected = {name: tensor.to(stored).float() for name, tensor in load_file(copy / SINGLE).items()}
    spoil(copy, lambda tensors: tensors.update({name: tensor.to(stored) for name, tensor in tensors.items()}))
    for name, tensor in filled(copy).items():
        assert torch.equal(tensor, expected[name])


def test_harmless_tensors_are_skipped(copy: Path) -> None:
    spoil(copy, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    spoil(copy, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    load(copy)


NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.pop(NORM), NORM),
        (lambda t: t.update({"model.layers.9.mlp.up_proj.weight": torch.ones(2)}), r"layers\.9"),
        (lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}), r"q_proj\.bias"),
        (lambda t: t.update({NORM: torch.ones(63)}), rf"{NORM} has shape \[63\].*\[64\]"),
        (lambda t: t.update({NORM: torch.ones(64, 1)}), r"shape \[64, 1\]"),
        (lambda t: t.update({NORM: torch.ones(64, dtype=torch.int8)}), f"{NORM} is of type I8"),
        (lambda t: t.update({NORM: torch.ones(64).to(torch.float8_e4m3fn)}), "F8_E4M3"),
    ],
)
def test_wrong_tensor_is_named(change: Callable[[dict[str, torch.Tensor]], object], named: str, copy: Path) -> None:
    spoil(copy, change)
    with pytest.raises(ConfigError, match=named):
        load(copy)


def test_untied_head_is_required(tiny_model: TinyModel, tmp_path: Path) -> None:
    shutil.copytree(tiny_model("llama2"), tmp_path / "m")
    spoil(tmp_path / "m", lambda t: t.pop("lm_head.weight"))
    with pytest.raises(ConfigError, match=r"lm_head\.weight"):
        load(tmp_path / "m")


def test_weights_too_large_for_float16_are_refused(copy: Path) -> None:
    spoil(copy, lambda t: t[NORM].fill_(1e6))
    load(copy, torch.bfloat16)
    with pytest.raises(ConfigError, match=f"{NORM} does not fit into float16"):
        load(copy, torch.float16)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"PK\x03\x04 not a safetensors file",
        struct.pack("<Q", 1 << 60) + b"{}",
        struct.pack("<Q", 2) + b"{]",
        struct.pack("<Q", 69) + b'{"model.norm.weight":{"dtype":"F32","shape":[64],"data_offsets":[0,8]}}'[:69],
    ],
)
def test_false_header_is_named(data: bytes, copy: Path) -> None:
    (copy / SINGLE).write_bytes(data)
    with pytest.raises(ConfigError, match=SINGLE):
        load(copy)


def test_truncated_file_is_named(copy: Path) -> None:
    data = (copy / SINGLE).read_bytes()
    (copy / SINGLE).write_bytes(data[: len(data) // 2])
    with pytest.raises(ConfigError, match=SINGLE):
        load(copy)


@pytest.mark.parametrize(
    "index",
    ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": "gone.safetensors"}}', '{"weight_map": {"a": "../x"}}'],
)
def test_wrong_index_is_refused(index: str, copy: Path) -> None:
    (copy / SINGLE).rename(copy.parent / "x")
    (copy / INDEX).write_text(index)
    with pytest.raises(ConfigError, match="index"):
        load(copy)


def test_tensor_in_two_shards_is_refused(copy: Path) -> None:
    (copy / SINGLE).rename(copy / "a.safetensors")
    shutil.copy(copy / "a.safetensors", copy / "b.safetensors")
    (copy / INDEX).write_text(json.dumps({"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}))
    with pytest.raises(ConfigError, match="twice"):
        load(copy)


def test_directory_without_safetensors_names_the_conversion(copy: Path) -> None:
    (copy / SINGLE).unlink()
    with pytest.raises(ConfigError, match=SINGLE):
        load(copy)
    (copy / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"pytorch_model\.bin.*Convert"):
        load(copy)


def test_progress_goes_to_stderr_on_request(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load(copy)
    assert capsys.readouterr() == ("", "")
    load(copy, progress=BusyTimer())
    out, err = capsys.readouterr()
    assert out == ""
    assert "weights: 100%" in err


def test_placement_takes_only_its_cut(tmp_path: Path) -> None:
    save_file({"w": torch.arange(24.0).view(4, 6)}, tmp_path / SINGLE)
    into = torch.empty(4, 3)
    load_checkpoint(tmp_path, [Placement("w", into, (4, 6), (slice(None), slice(3, 6)))])
    assert torch.equal(into, torch.arange(24.0).view(4, 6)[:, 3:])


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_lfs_pointer_is_named_with_its_command(name: str, copy: Path) -> None:
    (copy / name).write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 9\n")
    with pytest.raises(ConfigError, match=rf"{name}: a Git-LFS pointer .* run: git -C {copy} lfs pull$"):
        load(copy)
