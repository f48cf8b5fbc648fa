"""PEFT LoRA directories: adapter_config.json beside adapter_model.safetensors (or its shards and their index).

Two steps, so that limits are checked before data is read: `survey` reads the config and the headers, `read` brings
the tensors into the normal form. Knows nothing of ids, limits and pages.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch

from engine.errors import AdapterError
from model_runner.lora.adapter import Delta, Deltas
from model_runner.lora.catalogue import Catalogue, leaf
from model_runner.lora.formats.landing import Landing, land, show
from model_runner.lora.formats.peft_config import PeftConfig, read_config
from model_runner.lora.formats.targets import resolve_targets
from model_runner.lora.formats.tensor_file import Entry, TensorFile, open_tensors

WEIGHTS_NAME = "adapter_model.safetensors"
INDEX_NAME = "adapter_model.safetensors.index.json"
PICKLE_NAME = "adapter_model.bin"
MAX_INDEX_BYTES = 16 << 20

CONVERSION = (
    'python -c "import torch, safetensors.torch as s; '
    f"s.save_file(torch.load('{PICKLE_NAME}', weights_only=True), '{WEIGHTS_NAME}')\""
)


class ShardIndex(msgspec.Struct, frozen=True):
    """The index of a sharded checkpoint: which file holds which tensor."""

    weight_map: dict[str, str]


@dataclass(frozen=True, eq=False)
class Contents:
    """An adapter's values in the normal form, its content hash, and the dtypes that had to be cast."""

    deltas: Deltas
    revision: str
    cast_from: list[str]


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

    def read(self, dtype: torch.dtype) -> Contents:
        """Reads, hashes and converts. Raises AdapterError for values that are not finite in `dtype`."""
        digest = hashlib.sha256(self.config.scale_bytes())
        tensors: dict[str, torch.Tensor] = {}
        for file in self.files:
            tensors |= file.read(digest.update)
        cast_from = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values() if tensor.dtype != dtype}
        return Contents(self._deltas(tensors, dtype), digest.hexdigest(), sorted(cast_from))

    def _deltas(self, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> Deltas:
        deltas: dict[str, list[Delta | None]] = {}
        for landing in self.landings:
            site = landing.place.site
            slices = deltas.setdefault(site.name, [None] * len(site.slices))
            slices[landing.place.index] = _delta(landing, tensors, dtype)
        return {name: tuple(slices) for name, slices in deltas.items()}


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
    if (root / WEIGHTS_NAME).is_file():
        return [open_tensors(root / WEIGHTS_NAME)]
    if (root / INDEX_NAME).is_file():
        return _open_shards(root)
    if (root / PICKLE_NAME).is_file():
        raise AdapterError(f"{PICKLE_NAME}: pickles are not read; convert it in its directory: {CONVERSION}")
    raise AdapterError(f"{WEIGHTS_NAME}: not found")


def _open_shards(root: Path) -> list[TensorFile]:
    path = root / INDEX_NAME
    if path.stat().st_size > MAX_INDEX_BYTES:
        raise AdapterError(f"{INDEX_NAME}: more than {MAX_INDEX_BYTES} bytes")
    try:
        index = msgspec.json.decode(path.read_bytes(), type=ShardIndex)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise AdapterError(f"{INDEX_NAME}: {error}") from error
    names = sorted(set(index.weight_map.values()))
    for name in names:
        if "/" in name or "\\" in name or not name.endswith(".safetensors") or not (root / name).is_file():
            raise AdapterError(f"{INDEX_NAME}: {show(name)} is no safetensors file beside it")
    files = [open_tensors(root / name) for name in names]
    held = [(tensor, file.path.name) for file in files for tensor in file.entries]
    for tensor, name in sorted(set(held) ^ set(index.weight_map.items())):
        raise AdapterError(f"{INDEX_NAME}: tensor {show(tensor)} and file {show(name)} disagree")
    return files


def _delta(landing: Landing, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> Delta:
    """A and B of one module; scaling is folded into B in float32, then both are cast."""
    a, b = tensors[landing.a], tensors[landing.b]
    scaled = b.to(torch.float32).t() * landing.target.scaling
    return Delta(
        _finite(landing.a, a, a.to(torch.float32).to(dtype).contiguous()),
        _finite(landing.b, b, scaled.to(dtype).contiguous()),
    )


def _finite(name: str, source: torch.Tensor, converted: torch.Tensor) -> torch.Tensor:
    if bool(torch.isfinite(converted).all()):
        return converted
    if not bool(torch.isfinite(source).all()):
        raise AdapterError(f"tensor {show(name)} holds NaN or infinity")
    raise AdapterError(f"tensor {show(name)} holds values too large for {converted.dtype} once scaled")
