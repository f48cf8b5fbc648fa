"""PEFT LoRA directories: adapter_config.json beside adapter_model.safetensors (or its shards and their index).

Two steps, so that limits are checked and memory is measured before data is read: `survey` reads the config and the
headers, `read` brings the tensors into the normal form, where the caller wants it. Knows nothing of ids, limits and
pages.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch

from engine.errors import AdapterError
from engine.messages import Footprint
from model_runner.lora.adapter import Delta, Deltas, pages_for
from model_runner.lora.catalogue import Catalogue, leaf
from model_runner.lora.formats.landing import NAME, Landing, land, show
from model_runner.lora.formats.peft_config import PeftConfig, read_config
from model_runner.lora.formats.regular_file import read_bounded
from model_runner.lora.formats.targets import resolve_targets
from model_runner.lora.formats.tensor_file import FLOATS, Entry, TensorFile, open_tensors

WEIGHTS_NAME = "adapter_model.safetensors"
INDEX_NAME = "adapter_model.safetensors.index.json"
PICKLE_NAME = "adapter_model.bin"
EXTRA_TOKENS_NAME = "new_embeddings.safetensors"
MAX_INDEX_BYTES = 16 << 20
MAX_HEADERS_BYTES = 64 << 20
"""Of all shards together."""

CONVERSION = (
    'python -c "import torch, safetensors.torch as s; '
    f"s.save_file(torch.load('{PICKLE_NAME}', weights_only=True), '{WEIGHTS_NAME}')\""
)


class ShardIndex(msgspec.Struct, frozen=True):
    """The index of a sharded checkpoint: which file holds which tensor."""

    weight_map: dict[str, str]


@dataclass(frozen=True, eq=False)
class Survey:
    """What config and headers say of an adapter; everything but the values is checked."""

    config: PeftConfig
    files: list[TensorFile]
    landings: list[Landing]

    @property
    def rank(self) -> int:
        """The highest rank of any module."""
        return max(landing.target.rank for landing in self.landings)

    @property
    def targets(self) -> list[str]:
        """Sorted names of the modules it touches ("q_proj")."""
        return sorted({leaf(landing.target.module) for landing in self.landings})

    @property
    def footprint(self) -> Footprint:
        """The rank pages it needs, by group."""
        pages: dict[str, int] = {}
        for landing in self.landings:
            group = landing.place.site.group
            pages[group] = max(pages.get(group, 0), pages_for(landing.target.rank))
        return Footprint(pages)

    @property
    def data_bytes(self) -> int:
        """Bytes of the tensors in the files."""
        return sum(file.data_bytes for file in self.files)

    @property
    def tensors(self) -> int:
        """How many tensors the files hold."""
        return sum(len(file.entries) for file in self.files)

    @property
    def dialect(self) -> str:
        """How the tensors are named."""
        names = [NAME.fullmatch(name) for file in self.files for name in file.entries]
        prefixed = all(found and found["prefix"] for found in names)
        named = any(found and found["adapter"] for found in names)
        keys = "base_model.model.*.lora_A.weight" if prefixed else "*.lora_A.weight"
        return keys.replace(".weight", ".<name>.weight") if named else keys

    def cast_from(self, dtype: torch.dtype) -> list[str]:
        """The float dtypes in the files that are not the serving dtype."""
        kinds = {FLOATS[entry.dtype] for file in self.files for entry in file.entries.values()}
        return sorted(str(kind).removeprefix("torch.") for kind in kinds if kind != dtype)

    def read(self, into: Deltas) -> str:
        """Reads, hashes and converts into these tensors, whose shapes are those of `landings`; the revision.

        Raises AdapterError for values that are not finite in the dtype of `into`.
        """
        halves = {landing.a: landing for landing in self.landings} | {landing.b: landing for landing in self.landings}
        digest = hashlib.sha256(self.config.scale_bytes())
        for file in self.files:
            for name, tensor in file.tensors(digest.update):
                landing = halves[name]
                delta = into[landing.place.site.name][landing.place.index]
                assert delta is not None
                _convert(landing, name, tensor, delta)
        return digest.hexdigest()


def survey(root: Path, catalogue: Catalogue) -> Survey:
    """Config and headers of the adapter in `root`, every name and shape checked against the model."""
    if not root.is_dir():
        raise AdapterError(f"{root}: no such directory")
    config = read_config(root)
    files = _open_files(root)
    entries: dict[str, Entry] = {}
    for file in files:
        entries |= file.entries
    return Survey(config, files, land(entries, resolve_targets(config, catalogue), catalogue))


def _open_files(root: Path) -> list[TensorFile]:
    present = set(os.listdir(root))
    weights = sorted(name for name in present if name.startswith("adapter_model") and name.endswith(".safetensors"))
    if EXTRA_TOKENS_NAME in present:
        raise AdapterError(f"{EXTRA_TOKENS_NAME}: added tokens are not supported yet")
    if INDEX_NAME in present and WEIGHTS_NAME not in present:
        return _open_shards(root)
    if len(weights) > 1:
        raise AdapterError(
            f"{len(weights)} weight files ({show(', '.join(weights))}): keep either {WEIGHTS_NAME} alone or "
            f"shards with their {INDEX_NAME}"
        )
    if WEIGHTS_NAME in present:
        return [open_tensors(root / WEIGHTS_NAME)]
    if PICKLE_NAME in present:
        raise AdapterError(f"{PICKLE_NAME}: pickles are not read; convert it in its directory: {CONVERSION}")
    raise AdapterError(f"{WEIGHTS_NAME}: not found")


def _open_shards(root: Path) -> list[TensorFile]:
    try:
        index = msgspec.json.decode(read_bounded(root / INDEX_NAME, MAX_INDEX_BYTES), type=ShardIndex)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise AdapterError(f"{INDEX_NAME}: {error}") from error
    names = sorted(set(index.weight_map.values()))
    for name in names:
        if "/" in name or "\\" in name or not name.endswith(".safetensors"):
            raise AdapterError(f"{INDEX_NAME}: {show(name)} is no safetensors file beside it")
    files: list[TensorFile] = []
    for name in names:
        files.append(open_tensors(root / name))
        if sum(len(file.head) for file in files) > MAX_HEADERS_BYTES:
            raise AdapterError(f"{INDEX_NAME}: the headers of its files have more than {MAX_HEADERS_BYTES} bytes")
    held = [(tensor, file.path.name) for file in files for tensor in file.entries]
    for tensor, name in sorted(set(held) ^ set(index.weight_map.items())):
        raise AdapterError(f"{INDEX_NAME}: tensor {show(tensor)} and file {show(name)} disagree")
    return files


def _convert(landing: Landing, name: str, source: torch.Tensor, into: Delta) -> None:
    """One half of a module; scaling is folded into B in float32, and both are cast from float32."""
    if name == landing.a:
        converted = into.a.copy_(source.to(torch.float32) if source.dtype is torch.float64 else source)
    else:
        converted = into.b.copy_((source.to(torch.float32) * landing.target.scaling).t())
    if bool(torch.isfinite(converted).all()):
        return
    if not bool(torch.isfinite(source).all()):
        raise AdapterError(f"tensor {show(name)} holds NaN or infinity")
    raise AdapterError(f"tensor {show(name)} holds values too large for {converted.dtype} once scaled")
