"""PEFT directories of every format: adapter_config.json beside adapter_model.safetensors (or shards and an index).

Two steps, so that limits are checked and memory is measured before data is read: `survey` reads the config and the
headers, `read` brings the tensors into the normal form, where the caller wants it. Knows nothing of ids, limits and
pages.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch

from engine.errors import AdapterError
from engine.messages import Footprint
from model_runner.lora.catalogue import Catalogue
from model_runner.lora.files.regular_file import read_bounded
from model_runner.lora.files.tensor_file import FLOATS, Entry, TensorFile, open_tensors
from model_runner.lora.normal_form import Deltas, pages_for
from model_runner.lora.peft.activated import check_activated
from model_runner.lora.peft.base_weights import BaseWeights
from model_runner.lora.peft.config import PeftConfig, read_config
from model_runner.lora.peft.convert import convert
from model_runner.lora.peft.expert_stacks import Unstacked, unstack
from model_runner.lora.peft.names import ORIGINAL, adapted_modules, parse, show
from model_runner.lora.peft.targets import resolve_targets
from model_runner.lora.peft.tensor_mapping import FORMATS, TensorMapping, land
from model_runner.lora.site import full_weights_of, vectors_of

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
class AdapterSurvey:
    """What config and headers say of an adapter; everything but the values is checked."""

    config: PeftConfig
    files: list[TensorFile]
    mappings: list[TensorMapping]
    dialect: str
    unstacked: Unstacked

    @property
    def format(self) -> str:
        """The format, for people."""
        config = self.config
        if config.peft_type != "LORA":
            return f"PEFT {FORMATS[config.peft_type].name}"
        name = "DoRA" if config.use_dora else "LoRA"
        kinds = ["activated"] * bool(self.invocation) + ["rank-stabilised"] * config.use_rslora
        return " ".join(["PEFT", *kinds, name])

    @property
    def invocation(self) -> list[int]:
        """The tokens from which on it acts; none: from the first token on."""
        return self.config.alora_invocation_tokens or []

    @property
    def rank(self) -> int:
        """The highest rank of any module in the normal form."""
        return max(mapping.rank for mapping in self.mappings)

    @property
    def targets(self) -> list[str]:
        """Sorted names of the modules it touches ("q_proj")."""
        return sorted({place.slice.module for mapping in self.mappings for place in mapping.places})

    @property
    def vocab_size(self) -> int:
        """Tokens of a vocabulary of its own, 0: the base's."""
        return max(mapping.rows for mapping in self.mappings)

    @property
    def added_tokens(self) -> int:
        """How many tokens more than the base its vocabulary has; below 0: fewer."""
        return next((mapping.rows - mapping.places[0].site.vocabulary for mapping in self.mappings if mapping.rows), 0)

    @property
    def biased(self) -> str | None:
        """A module that is given a bias, if there is one."""
        return next((mapping.name for mapping in self.mappings if mapping.has_bias), None)

    @property
    def footprint(self) -> Footprint:
        """The rank pages and vector slots it needs, by group."""
        pages: dict[str, int] = {}
        for mapping in self.mappings:
            group = mapping.places[0].site.group
            if mapping.rank:
                pages[group] = max(pages.get(group, 0), pages_for(mapping.rank))
            if mapping.has_gain or mapping.has_bias:
                pages[vectors_of(group)] = 1
            if mapping.has_whole:
                pages[full_weights_of(group)] = 1
        return Footprint(pages)

    @property
    def data_bytes(self) -> int:
        """Bytes of the tensors in the files."""
        return sum(file.data_bytes for file in self.files)

    @property
    def tensors(self) -> int:
        """How many tensors the files hold."""
        return sum(len(file.entries) for file in self.files)

    def cast_from(self, dtype: torch.dtype) -> list[str]:
        """The float dtypes in the files that are not the serving dtype."""
        kinds = {FLOATS[entry.dtype] for file in self.files for entry in file.entries.values()}
        return sorted(str(kind).removeprefix("torch.") for kind in kinds if kind != dtype)

    def read(self, into: Deltas, base: BaseWeights) -> str:
        """Reads, hashes and converts into these tensors, whose shapes are those of `mappings`; the revision.

        A module is converted when all of its tensors were read: a file that holds them together, as PEFT's do, needs
        memory for one module. Raises AdapterError for values that are not finite in the dtype of `into`.
        """
        owners: dict[str, list[tuple[TensorMapping, str]]] = {}
        for mapping in self.mappings:
            for part, tensor in mapping.parts.items():
                owners.setdefault(tensor, []).append((mapping, part))
        waiting: dict[str, dict[str, torch.Tensor]] = {}
        digest = hashlib.sha256(self.config.scale_bytes())
        for file in self.files:
            for stored, whole in file.tensors(digest.update):
                for name, values in self.unstacked.parts(stored, whole):
                    for mapping, part in owners[name]:
                        held = waiting.setdefault(mapping.name, {})
                        held[part] = values[:0] if part == ORIGINAL else values.clone()  # nothing is made of it
                        if len(held) == len(mapping.parts):
                            convert(mapping, waiting.pop(mapping.name), into, base)
        return digest.hexdigest()


def read_survey(root: Path, catalogue: Catalogue) -> AdapterSurvey:
    """Config and headers of the adapter in `root`, every name and shape checked against the model."""
    if not root.is_dir():
        raise AdapterError(f"{root}: no such directory")
    config = read_config(root)
    files = _open_files(root)
    entries: dict[str, Entry] = {}
    for file in files:
        entries |= file.entries
    unstacked = unstack(entries, config, catalogue)
    targets = unstacked.targets
    if config.target_modules:
        targets = resolve_targets(config, catalogue, adapted_modules(entries, catalogue)) | targets
    mappings = land(unstacked.entries, config, targets, catalogue)
    check_activated(config, mappings, catalogue)
    return AdapterSurvey(config, files, mappings, _dialect(unstacked.entries, catalogue), unstacked)


def _dialect(entries: Iterable[str], catalogue: Catalogue) -> str:
    """How the tensors are named."""
    names = [parse(tensor, catalogue) for tensor in entries]
    part = min(name.part for name in names)
    if any(name.named for name in names):
        marker, dot, own = part.partition(".")
        part = f"{marker}.<name>{dot}{own}"
    return f"base_model.model.*.{part}" if all(name.prefixed for name in names) else f"*.{part}"


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
