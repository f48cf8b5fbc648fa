"""Finds and opens the safetensors files of a PEFT directory: adapter_model.safetensors, or shards with an index."""

from __future__ import annotations

import shlex
from collections.abc import Iterable

import msgspec

from engine.directory import Directory
from engine.errors import AdapterError
from model_runner.lora.files.advice import CONVERSION, PICKLE_NAME, WEIGHTS_NAME
from model_runner.lora.files.quoted import quoted_name
from model_runner.lora.files.tensor_file import TensorFile, open_tensors

INDEX_NAME = "adapter_model.safetensors.index.json"
EXTRA_TOKENS_NAME = "new_embeddings.safetensors"
MAX_INDEX_BYTES = 16 << 20
MAX_HEADERS_BYTES = 64 << 20
"""The most bytes of the headers of all shards together."""
MAX_SHARDS = 256
"""The most shards of an adapter: all of them are open while the adapter is read."""


class ShardIndex(msgspec.Struct, frozen=True):
    """The index of a sharded checkpoint: which file holds which tensor."""

    weight_map: dict[str, str]


def open_weight_files(directory: Directory) -> list[TensorFile]:
    """Opens the adapter's safetensors files and checks their headers. Raises AdapterError naming the file at fault."""
    present = set(directory.names())
    weights = sorted(name for name in present if name.startswith("adapter_model") and name.endswith(".safetensors"))
    if EXTRA_TOKENS_NAME in present:
        raise AdapterError(f"{EXTRA_TOKENS_NAME}: added tokens are not supported yet")
    if INDEX_NAME in present and WEIGHTS_NAME not in present:
        return _open_shards(directory)
    if len(weights) > 1:
        raise AdapterError(
            f"{len(weights)} weight files ({quoted_name(', '.join(weights))}): keep either {WEIGHTS_NAME} alone or "
            f"shards with their {INDEX_NAME}"
        )
    if WEIGHTS_NAME in present:
        return [open_tensors(directory.open(WEIGHTS_NAME), WEIGHTS_NAME)]
    if PICKLE_NAME in present:
        raise AdapterError(f"{PICKLE_NAME}: pickles are not read; convert it, run in its directory: {CONVERSION}")
    raise AdapterError(f"{WEIGHTS_NAME}: not found{_renaming(present)}")


def _renaming(present: Iterable[str]) -> str:
    """Returns the command that gives the only safetensors file its usual name, or nothing."""
    others = [name for name in present if name.endswith(".safetensors")]
    if len(others) != 1:
        return ""
    return f"; if {quoted_name(others[0])} is it, run in its directory: mv {shlex.quote(others[0])} {WEIGHTS_NAME}"


def _open_shards(directory: Directory) -> list[TensorFile]:
    try:
        index = msgspec.json.decode(directory.read(INDEX_NAME, MAX_INDEX_BYTES), type=ShardIndex)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise AdapterError(f"{INDEX_NAME}: {error}") from error
    names = sorted(set(index.weight_map.values()))
    for name in names:
        if "/" in name or "\\" in name or not name.endswith(".safetensors"):
            raise AdapterError(f"{INDEX_NAME}: {quoted_name(name)} is no safetensors file beside it")
    if len(names) > MAX_SHARDS:
        raise AdapterError(f"{INDEX_NAME}: it names {len(names)} files, at most {MAX_SHARDS} are read")
    files: list[TensorFile] = []
    for name in names:
        files.append(open_tensors(directory.open(name), name))
        if sum(len(file.head) for file in files) > MAX_HEADERS_BYTES:
            raise AdapterError(f"{INDEX_NAME}: the headers of its files have more than {MAX_HEADERS_BYTES} bytes")
    held = [(tensor, file.name) for file in files for tensor in file.entries]
    for tensor, name in sorted(set(held) ^ set(index.weight_map.items())):
        raise AdapterError(f"{INDEX_NAME}: tensor {quoted_name(tensor)} and file {quoted_name(name)} disagree")
    return files
