"""Broken files: each is refused in one line that names the adapter and the file at fault."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures.adapters.lora_sites import plain_tensors, random_sites, write_adapter
from fixtures.adapters.refusals import load, refusal
from safetensors.torch import load_file, save_file

from engine.directory import Directory
from engine.errors import AdapterError
from model_runner.lora.files.tensor_file import open_tensors

SITES = random_sites()
TARGETS = ["q_proj", "down_proj"]
INDEX = "adapter_model.safetensors.index.json"
Q_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
Q_B = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "fox", plain_tensors(SITES, TARGETS), target_modules=TARGETS)


def rewrite(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Edits the header of a safetensors file; its data stay as they are."""
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


LIES: dict[str, Callable[[dict[str, Any]], None]] = {
    "ends past the file": lambda header: header[Q_A].update(data_offsets=[0, 10**12]),
    "a shape that is not its bytes": lambda header: header[Q_A].update(shape=[4, 10**9]),
    "backwards": lambda header: header[Q_A].update(data_offsets=[8, 0]),
    "negative": lambda header: header[Q_A].update(shape=[-4, -24]),
    "overlapping": lambda header: header[Q_A].update(
        data_offsets=header[next(n for n in header if n != Q_A)]["data_offsets"]
    ),
    "no offsets": lambda header: header[Q_A].pop("data_offsets"),
    "a number for a tensor": lambda header: header.update({Q_A: 3}),
}


@pytest.mark.parametrize("lie", LIES)
def test_false_header_is_refused(lie: str, root: Path) -> None:
    path = root / "adapter_model.safetensors"
    rewrite(path, LIES[lie])
    assert "adapter_model.safetensors" in refusal(SITES, root)


def test_file_that_changes_after_its_header_is_refused(root: Path) -> None:
    path = root / "adapter_model.safetensors"
    with Directory(root) as directory:
        file = open_tensors(directory.open(path.name), path.name)
        whole = path.read_bytes()
        for other in (whole[:-4], whole + b"\0", whole.replace(b"q_proj", b"k_proj"), b""):
            path.write_bytes(other)
            with pytest.raises(AdapterError, match="changed while it was being read"):
                list(file.tensors(lambda _: None))


def test_file_that_is_replaced_after_its_header_is_still_read(root: Path) -> None:
    """The tensors are those of the file that was opened, even if its name refers to another file by then."""
    path, found = root / "adapter_model.safetensors", list[bytes]()
    expected, whole = load_file(path), path.read_bytes()
    with Directory(root) as directory:
        file = open_tensors(directory.open(path.name), path.name)
        (root / "other").write_bytes(whole[:-4] + b"\0\0\0\0")
        (root / "other").rename(path)
        read = {name: value.clone() for name, value in file.tensors(found.append)}
    assert found == [hashlib.sha256(whole).digest()]
    assert all(torch.equal(read[name], expected[name]) for name in expected)


def test_digest_is_that_of_the_whole_file(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model_runner.lora.files.tensor_file.SLICE_BYTES", 100)
    path, found = root / "adapter_model.safetensors", list[bytes]()
    with Directory(root) as directory:
        file = open_tensors(directory.open(path.name), path.name)
        tensors = {name: value.clone() for name, value in file.tensors(found.append)}
    assert found == [hashlib.sha256(path.read_bytes()).digest()]
    expected = load_file(path)
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)


FILES: dict[str, bytes] = {
    "empty": b"",
    "short": b"abc",
    "header longer than the file": struct.pack("<Q", 1 << 40) + b"{}",
    "header is no JSON": struct.pack("<Q", 4) + b"nope",
    "header is a list": struct.pack("<Q", 2) + b"[]",
    "header is no UTF-8": struct.pack("<Q", 4) + b'"\xff\xfe"',
    "deep header": struct.pack("<Q", 200_000) + b"[" * 200_000,
    "a pickle": b"\x80\x02}q\x00." * 20,
}


@pytest.mark.parametrize("case", FILES)
def test_file_that_is_not_safetensors_is_refused(case: str, root: Path) -> None:
    (root / "adapter_model.safetensors").write_bytes(FILES[case])
    assert "adapter_model.safetensors" in refusal(SITES, root)


def test_truncated_file_is_refused(root: Path) -> None:
    path = root / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert "truncated" in refusal(SITES, root)


def test_bytes_that_belong_to_no_tensor_are_refused(root: Path) -> None:
    path = root / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes() + b"\0" * 8)
    assert "8 bytes belong to no tensor" in refusal(SITES, root)


def test_header_above_the_bound_is_not_read(root: Path) -> None:
    path = root / "adapter_model.safetensors"
    with path.open("r+b") as file:
        file.write(struct.pack("<Q", 1 << 30))
        file.truncate(1 << 31)  # sparse: the header's size is checked before it is read
    assert "header claims" in refusal(SITES, root)


def test_missing_directory_is_refused(tmp_path: Path) -> None:
    assert "no such directory" in refusal(SITES, tmp_path / "nowhere")


def test_missing_config_is_refused(root: Path) -> None:
    (root / "adapter_config.json").unlink()
    assert "there is no adapter_config.json beside its adapter_model.safetensors" in refusal(SITES, root)


@pytest.mark.parametrize("text", ["{", "[]", '"r"', '{"r": NaN}', "[" * 100_000, "\xff"])
def test_config_that_is_not_an_object_is_refused(text: str, root: Path) -> None:
    (root / "adapter_config.json").write_bytes(text.encode("latin-1"))
    assert "adapter_config.json" in refusal(SITES, root)


def test_missing_weights_are_refused(root: Path) -> None:
    (root / "adapter_model.safetensors").unlink()
    assert "adapter_model.safetensors: not found" in refusal(SITES, root)


def run_the_advice(message: str, root: Path) -> None:
    """Runs the command at the end of a refusal as a user would: in the adapter's directory, in a shell."""
    command = message.partition("run in its directory: ")[2]
    assert command, message
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(command, shell=True, cwd=root, env={**os.environ, "PATH": path}, check=True, timeout=120)


def test_conversion_in_the_refusal_of_a_pickle_works(root: Path) -> None:
    """Also for tensors that share memory, are transposed, or are expanded."""
    expected = load(SITES, root).revision
    tensors = load_file(root / "adapter_model.safetensors")
    shared = torch.stack([tensors[Q_A], tensors[Q_A]])
    tensors |= {Q_A: shared[1], Q_B: tensors[Q_B].t().contiguous().t()}
    torch.save(tensors, root / "adapter_model.bin")
    (root / "adapter_model.safetensors").unlink()
    message = refusal(SITES, root)
    assert "adapter_model.bin" in message
    run_the_advice(message, root)
    assert load(SITES, root).revision == expected


def test_command_that_leaves_out_tensors_works(root: Path) -> None:
    path = root / "adapter_model.safetensors"
    expected = load(SITES, root).revision
    strange = {f"base_model.model.{name}": torch.ones(4) for name in ("score.weight", "score.bias")}
    save_file(load_file(path) | strange, path)
    run_the_advice(refusal(SITES, root), root)
    assert load(SITES, root).revision == expected


def test_directory_instead_of_a_file_is_refused(root: Path) -> None:
    (root / "adapter_config.json").unlink()
    (root / "adapter_config.json").mkdir()
    assert "adapter_config.json" in refusal(SITES, root)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("kind", ["pipe", "device", "loop", "link to nothing"])
def test_pipe_device_or_broken_link_is_refused_at_once(name: str, kind: str, root: Path) -> None:
    (root / name).unlink()
    if kind == "pipe":
        os.mkfifo(root / name)
    else:
        (root / name).symlink_to({"device": "/dev/zero", "loop": name, "link to nothing": "nothing"}[kind])
    assert name in refusal(SITES, root)


def test_link_to_a_file_elsewhere_is_followed(root: Path) -> None:
    (root / "adapter_model.safetensors").rename(root.parent / "blob")
    (root / "adapter_model.safetensors").symlink_to(root.parent / "blob")
    load(SITES, root)


def test_config_above_the_bound_is_not_read(root: Path) -> None:
    with (root / "adapter_config.json").open("r+b") as file:
        file.truncate(1 << 33)
    assert "adapter_config.json: more than" in refusal(SITES, root)


@pytest.mark.parametrize(
    "present", [["adapter_model-1.safetensors", "adapter_model-2.safetensors"], ["adapter_model.safetensors", "-2"]]
)
def test_two_weight_files_without_an_index_are_refused(present: list[str], root: Path) -> None:
    whole = (root / "adapter_model.safetensors").read_bytes()
    (root / "adapter_model.safetensors").unlink()
    for name in present:
        (root / (name if name.startswith("a") else f"adapter_model{name}.safetensors")).write_bytes(whole)
    assert "2 weight files" in refusal(SITES, root)


def test_added_tokens_file_is_refused_by_name(root: Path) -> None:
    (root / "new_embeddings.safetensors").write_bytes(b"")
    assert "new_embeddings.safetensors" in refusal(SITES, root)


def test_too_many_shards_are_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model_runner.lora.files.weight_files.MAX_SHARDS", 2)
    names = list(load_file(root / "adapter_model.safetensors"))
    (root / "adapter_model.safetensors").unlink()
    index = {name: f"adapter_model-{number % 3}.safetensors" for number, name in enumerate(names)}
    (root / INDEX).write_text(json.dumps({"weight_map": index}))
    assert f"{INDEX}: it names 3 files, at most 2 are read" in refusal(SITES, root)


def test_shards_with_too_many_header_bytes_are_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model_runner.lora.files.weight_files.MAX_HEADERS_BYTES", 100)
    whole = root / "adapter_model.safetensors"
    index = {"weight_map": dict.fromkeys(load_file(whole), "adapter_model-1.safetensors")}
    whole.rename(root / "adapter_model-1.safetensors")
    (root / "adapter_model.safetensors.index.json").write_text(json.dumps(index))
    assert "more than 100 bytes" in refusal(SITES, root)


@pytest.mark.parametrize("named", ["../other.safetensors", "/etc/passwd", "missing.safetensors", "weights.bin", INDEX])
def test_index_that_names_a_file_elsewhere_is_refused(named: str, root: Path) -> None:
    (root / "adapter_model.safetensors").rename(root.parent / "other.safetensors")
    tensors = load_file(root.parent / "other.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, named)}
    (root / "adapter_model.safetensors.index.json").write_text(json.dumps(index))
    assert named in refusal(SITES, root)


def test_index_that_disagrees_with_its_files_is_refused(root: Path) -> None:
    (root / "adapter_model.safetensors").rename(root / "part.safetensors")
    (root / "adapter_model.safetensors.index.json").write_text(json.dumps({"weight_map": {Q_A: "part.safetensors"}}))
    assert "disagree" in refusal(SITES, root)
