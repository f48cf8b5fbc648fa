"""Every way an adapter's files can be wrong ends in one line that names the adapter and the part at fault."""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures.adapters.lora_sites import plain_tensors, random_sites, write_adapter
from safetensors.torch import load_file, save_file

from engine.errors import AdapterError
from model_runner.lora.files.tensor_file import open_tensors
from model_runner.lora.store import AdapterStore

SITES = random_sites()
TARGETS = ["q_proj", "down_proj"]
INDEX = "adapter_model.safetensors.index.json"
Q_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
Q_B = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"


def load(root: Path, dtype: torch.dtype = torch.float32) -> None:
    AdapterStore(SITES, dtype, max_rank=None, targets=None).load(7, "fox", root)


def refusal(root: Path, dtype: torch.dtype = torch.float32) -> str:
    with pytest.raises(AdapterError) as caught:
        load(root, dtype)
    message = caught.value.message
    assert message.startswith("adapter 'fox': ")
    assert "\n" not in message
    assert len(message) <= 600
    return message


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "fox", plain_tensors(SITES, TARGETS), target_modules=TARGETS)


def test_the_whole_one_loads(root: Path) -> None:
    load(root)


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "another type": ({"peft_type": "IA3"}, 'peft_type="IA3"'),
    "another task": ({"task_type": "SEQ_CLS"}, 'task_type="SEQ_CLS"'),
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
    "parameters": ({"target_parameters": ["x"]}, 'target_parameters=["x"]'),
    "bdlora": ({"use_bdlora": {"nblocks": 2}}, "use_bdlora"),
    "arrow": ({"arrow_config": {"top_k": 2}}, "arrow_config"),
    "kasa": ({"kasa_config": {"beta": 1}}, "kasa_config"),
    "monteclora": ({"monteclora_config": {"x": 1}}, "monteclora_config"),
    "loftq": ({"init_lora_weights": "loftq"}, 'init_lora_weights="loftq"'),
    "pissa_niter": ({"init_lora_weights": "pissa_niter_16"}, 'init_lora_weights="pissa_niter_16"'),
    "lora_ga": ({"init_lora_weights": "lora_ga"}, 'init_lora_weights="lora_ga"'),
    "corda": ({"init_lora_weights": "corda"}, 'init_lora_weights="corda"'),
    "a stranger": ({"use_tomorrow": True}, "use_tomorrow=true"),
    "no targets": ({"target_modules": None}, "target_modules=null"),
    "empty targets": ({"target_modules": []}, "target_modules=[]"),
    "unknown target": ({"target_modules": ["q_proj", "down_proj", "query"]}, "'query'"),
    "regex without match": ({"target_modules": "nothing.*"}, "'nothing.*'"),
    "broken regex": ({"target_modules": "(q_proj"}, "'(q_proj'"),
    "broken pattern": ({"rank_pattern": {"[": 3}}, "rank_pattern"),
    "everything excluded": ({"exclude_modules": TARGETS}, "exclude_modules"),
    "regex with layers": ({"target_modules": ".*q_proj", "layers_to_transform": [0]}, "layers_to_transform"),
    "pattern without layers": ({"layers_pattern": "layers"}, 'layers_pattern="layers"'),
    "a target without tensors": ({"target_modules": [*TARGETS, "o_proj"]}, "model.layers.0.self_attn.o_proj"),
    "tensors without a target": ({"target_modules": ["q_proj"]}, "model.layers.0.mlp.down_proj"),
    "tensors of other layers": ({"layers_to_transform": [0]}, "does not target model.layers.1."),
    "another rank": ({"r": 5}, "expected [5, 24]"),
    "another pattern rank": ({"rank_pattern": {"q_proj": 3}}, "expected [3, 24]"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_config(case: str, root: Path) -> None:
    fields, named = CONFIGS[case]
    path = root / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    assert named in refusal(root)


@pytest.mark.parametrize("empty", [None, False, {}, [], ""])
def test_an_empty_unknown_option_is_fine(empty: object, root: Path) -> None:
    path = root / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_tomorrow": empty}))
    load(root)


def change(tensors: dict[str, torch.Tensor], case: str) -> str:
    """Breaks the tensors; answers with what the message must name."""
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
def test_tensors(case: str, root: Path) -> None:
    path = root / "adapter_model.safetensors"
    tensors = load_file(path)
    named = change(tensors, case)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    assert named in refusal(root)


def test_a_shape_error_says_got_and_expected(root: Path) -> None:
    path = root / "adapter_model.safetensors"
    save_file(load_file(path) | {Q_A: torch.zeros(4, 23)}, path)
    message = refusal(root)
    assert "[4, 23]" in message
    assert "[4, 24]" in message


def test_values_that_do_not_survive_the_serving_dtype(root: Path) -> None:
    path = root / "adapter_model.safetensors"
    save_file(load_file(path) | {Q_B: torch.full((32, 4), 40_000.0)}, path)  # alpha / r = 2
    load(root)
    assert f"'{Q_B}' holds values too large for torch.float16" in refusal(root, torch.float16)


def rewrite(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Edits the header of a safetensors file, leaving its data alone."""
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
def test_headers_that_lie(lie: str, root: Path) -> None:
    path = root / "adapter_model.safetensors"
    rewrite(path, LIES[lie])
    assert "adapter_model.safetensors" in refusal(root)


def test_a_file_that_changes_between_header_and_data(root: Path) -> None:
    path = root / "adapter_model.safetensors"
    file = open_tensors(path)
    whole = path.read_bytes()
    for other in (whole[:-4], whole + b"\0", whole.replace(b"q_proj", b"k_proj"), b""):
        path.write_bytes(other)
        with pytest.raises(AdapterError, match="changed while it was being read"):
            list(file.tensors(lambda _: None))


def test_what_is_hashed_is_the_file(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model_runner.lora.files.tensor_file.SLICE_BYTES", 100)
    path, found = root / "adapter_model.safetensors", list[bytes]()
    tensors = {name: value.clone() for name, value in open_tensors(path).tensors(found.append)}
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
def test_weights_that_are_no_safetensors(case: str, root: Path) -> None:
    (root / "adapter_model.safetensors").write_bytes(FILES[case])
    assert "adapter_model.safetensors" in refusal(root)


def test_truncated_weights(root: Path) -> None:
    path = root / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert "truncated" in refusal(root)


def test_bytes_of_no_tensor(root: Path) -> None:
    path = root / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes() + b"\0" * 8)
    assert "8 bytes belong to no tensor" in refusal(root)


def test_a_header_above_the_bound_is_not_read(root: Path) -> None:
    path = root / "adapter_model.safetensors"
    with path.open("r+b") as file:
        file.write(struct.pack("<Q", 1 << 30))
        file.truncate(1 << 31)  # sparse: claims are cheap, so they are checked first
    assert "header claims" in refusal(root)


def test_no_directory(tmp_path: Path) -> None:
    assert "no such directory" in refusal(tmp_path / "nowhere")


def test_no_config(root: Path) -> None:
    (root / "adapter_config.json").unlink()
    assert "adapter_config.json: not found" in refusal(root)


@pytest.mark.parametrize("text", ["{", "[]", '"r"', '{"r": NaN}', "[" * 100_000, "\xff"])
def test_a_config_that_is_no_object(text: str, root: Path) -> None:
    (root / "adapter_config.json").write_bytes(text.encode("latin-1"))
    assert "adapter_config.json" in refusal(root)


def test_no_weights(root: Path) -> None:
    (root / "adapter_model.safetensors").unlink()
    assert "adapter_model.safetensors: not found" in refusal(root)


def test_a_pickle_is_refused_with_the_conversion(root: Path) -> None:
    (root / "adapter_model.safetensors").rename(root / "adapter_model.bin")
    message = refusal(root)
    assert "adapter_model.bin" in message
    assert "save_file(torch.load('adapter_model.bin', weights_only=True)" in message


def test_a_directory_in_place_of_a_file(root: Path) -> None:
    (root / "adapter_config.json").unlink()
    (root / "adapter_config.json").mkdir()
    assert "adapter_config.json" in refusal(root)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("kind", ["pipe", "device", "loop", "link to nothing"])
def test_what_is_no_file_can_neither_block_nor_never_end(name: str, kind: str, root: Path) -> None:
    (root / name).unlink()
    if kind == "pipe":
        os.mkfifo(root / name)
    else:
        (root / name).symlink_to({"device": "/dev/zero", "loop": name, "link to nothing": "nothing"}[kind])
    assert name in refusal(root)


def test_a_link_to_a_file_elsewhere_is_followed(root: Path) -> None:
    (root / "adapter_model.safetensors").rename(root.parent / "blob")
    (root / "adapter_model.safetensors").symlink_to(root.parent / "blob")
    load(root)


def test_a_config_above_its_bound_is_not_read(root: Path) -> None:
    with (root / "adapter_config.json").open("r+b") as file:
        file.truncate(1 << 33)
    assert "adapter_config.json: more than" in refusal(root)


@pytest.mark.parametrize(
    "present", [["adapter_model-1.safetensors", "adapter_model-2.safetensors"], ["adapter_model.safetensors", "-2"]]
)
def test_two_weight_files_without_an_index(present: list[str], root: Path) -> None:
    whole = (root / "adapter_model.safetensors").read_bytes()
    (root / "adapter_model.safetensors").unlink()
    for name in present:
        (root / (name if name.startswith("a") else f"adapter_model{name}.safetensors")).write_bytes(whole)
    assert "2 weight files" in refusal(root)


def test_added_tokens_are_refused_by_their_file(root: Path) -> None:
    (root / "new_embeddings.safetensors").write_bytes(b"")
    assert "new_embeddings.safetensors" in refusal(root)


def test_shards_whose_headers_are_too_much_together(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model_runner.lora.files.weight_files.MAX_HEADERS_BYTES", 100)
    whole = root / "adapter_model.safetensors"
    index = {"weight_map": dict.fromkeys(load_file(whole), "adapter_model-1.safetensors")}
    whole.rename(root / "adapter_model-1.safetensors")
    (root / "adapter_model.safetensors.index.json").write_text(json.dumps(index))
    assert "more than 100 bytes" in refusal(root)


@pytest.mark.parametrize("named", ["../other.safetensors", "/etc/passwd", "missing.safetensors", "weights.bin", INDEX])
def test_an_index_that_points_elsewhere(named: str, root: Path) -> None:
    (root / "adapter_model.safetensors").rename(root.parent / "other.safetensors")
    tensors = load_file(root.parent / "other.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, named)}
    (root / "adapter_model.safetensors.index.json").write_text(json.dumps(index))
    assert named in refusal(root)


def test_an_index_that_disagrees_with_its_files(root: Path) -> None:
    (root / "adapter_model.safetensors").rename(root / "part.safetensors")
    (root / "adapter_model.safetensors.index.json").write_text(json.dumps({"weight_map": {Q_A: "part.safetensors"}}))
    assert "disagree" in refusal(root)
