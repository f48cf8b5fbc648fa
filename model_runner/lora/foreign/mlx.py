"""mlx-lm's LoRA and DoRA: adapter_config.json with "lora_parameters", and adapters.safetensors.

    linear      y + scale * (x lora_a) lora_b     lora_a [I, r], lora_b [r, O]: PEFT's A and B, transposed
    DoRA        (m / |W + scale * (lora_a lora_b)^T|) * (...)                   m: PEFT's magnitude
    embedding   lora_a [V, r], lora_b [r, H]; a tied head adds (x lora_b^T) lora_a^T
    experts     switch_mlp.gate_proj: lora_a [E, r, I], lora_b [E, O, r]

`scale` is explicit; versions with an `alpha` multiply it by alpha / rank. Does not depend on values. Legend: I in
features, O out features, r rank, V vocabulary, H hidden size, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import torch

from engine.directory import Directory
from engine.errors import AdapterError
from model_runner.lora.catalogue import EMBEDDING_AND_HEAD, Catalogue
from model_runner.lora.files.adapter_config import CONFIG_NAME
from model_runner.lora.files.quoted import quoted_name, quoted_value
from model_runner.lora.files.tensor_file import Entry, TensorFile, open_tensors

WEIGHTS_NAME = "adapters.safetensors"
OLD_WEIGHTS_NAME = "adapters.npz"
CONVERSION = (
    'python -c "import numpy, safetensors.numpy as s; '
    f"s.save_file(dict(numpy.load('{OLD_WEIGHTS_NAME}')), '{WEIGHTS_NAME}')\""
)
KINDS = ("lora", "dora")
STACKED = "switch_mlp"
EXPERT_NAMES = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
"""The names of Mixtral's experts in its checkpoints, by mlx-lm's."""


class LoraParameters(msgspec.Struct, frozen=True):
    """The object "lora_parameters"."""

    rank: int
    scale: float = 1.0
    alpha: float | None = None


class MlxConfig(msgspec.Struct, frozen=True):
    """The fields of mlx-lm's config that change what an adapter computes."""

    lora_parameters: LoraParameters
    fine_tune_type: str = "lora"
    use_dora: bool = False
    model: str | None = None


@dataclass(frozen=True)
class Converted:
    """One stored tensor: the names that it has in PEFT's form, and for each of them the view of the tensor."""

    names: tuple[str, ...]
    transposed: tuple[bool, ...]
    is_stack: bool = False

    def parts(self, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields the tensor, or each expert's part of it, under PEFT's names."""
        views = tensor.unbind(0) if self.is_stack else [tensor.t() if turned else tensor for turned in self.transposed]
        yield from zip(self.names, views, strict=True)

    def entries(self, entry: Entry) -> dict[str, Entry]:
        """Returns the header entries that the parts would have in a file of PEFT's."""
        if self.is_stack:
            return {name: Entry(entry.dtype, entry.shape[1:], entry.data_offsets) for name in self.names}
        shapes = [entry.shape[::-1] if turned else entry.shape for turned in self.transposed]
        named = zip(self.names, shapes, strict=True)
        return {name: Entry(entry.dtype, shape, entry.data_offsets) for name, shape in named}


def is_mlx(options: Mapping[str, Any]) -> bool:
    """Returns whether these are the options of mlx-lm rather than PEFT's."""
    return "peft_type" not in options and ("lora_parameters" in options or "fine_tune_type" in options)


def options_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options of mlx-lm as PEFT's. Raises AdapterError for what is neither LoRA nor DoRA."""
    kind = options.get("fine_tune_type", "lora")
    if kind not in KINDS:
        raise AdapterError(
            f"{CONFIG_NAME}: fine_tune_type={quoted_value(kind)} of mlx-lm is no adapter: fuse it with mlx_lm.fuse and"
            " serve the result with --model-path"
        )
    try:
        config = msgspec.convert(dict(options), MlxConfig)
    except msgspec.ValidationError as error:
        raise AdapterError(f"{CONFIG_NAME}: {error}") from error
    given = config.lora_parameters
    scale = given.scale if given.alpha is None else given.scale * given.alpha / max(given.rank, 1)
    return {
        "peft_type": "LORA",
        "r": given.rank,
        "lora_alpha": scale * given.rank,
        "use_dora": kind == "dora" or config.use_dora,
        "base_model_name_or_path": config.model,
        "target_modules": None,
    }


def open_file(directory: Directory) -> TensorFile:
    """Opens the adapter's file and checks its header. Raises AdapterError naming it."""
    if not directory.has(WEIGHTS_NAME) and directory.has(OLD_WEIGHTS_NAME):
        raise AdapterError(f"{OLD_WEIGHTS_NAME}: of mlx-lm; convert it, run in its directory: {CONVERSION}")
    return open_tensors(directory.open(WEIGHTS_NAME), WEIGHTS_NAME)


def convert(entries: Mapping[str, Entry], catalogue: Catalogue) -> dict[str, Converted]:
    """Returns how each stored tensor becomes PEFT's. Raises AdapterError for a tensor of another kind."""
    return {name: _convert(name, entry, catalogue) for name, entry in entries.items()}


def _convert(name: str, entry: Entry, catalogue: Catalogue) -> Converted:
    module, _, part = name.rpartition(".")
    if STACKED in module.split(".") and part in ("lora_a", "lora_b") and len(entry.shape) == 3:
        if entry.shape[0] > len(catalogue.refs):  # an empty tensor may claim any number, and each becomes names
            raise AdapterError(f"tensor {quoted_name(name)} has {entry.shape[0]} experts, and the model has fewer")
        return _stack(module, part, entry.shape[0])
    embedding, head = EMBEDDING_AND_HEAD
    if module.removeprefix("language_model.") == embedding and part in ("lora_a", "lora_b"):
        half = part[-1].upper()
        names, turned = [f"{embedding}.lora_embedding_{half}"], [True]
        if head in catalogue.refs and catalogue.refs[head][0].site.tied:
            names, turned = [*names, f"{head}.lora_{'B' if half == 'A' else 'A'}.weight"], [True, False]
        return Converted(tuple(names), tuple(turned))
    if part in ("lora_a", "lora_b"):
        return Converted((f"{module}.lora_{part[-1].upper()}.weight",), (True,))
    if part == "m" and module != embedding:
        return Converted((f"{module}.lora_magnitude_vector",), (False,))
    raise AdapterError(f"tensor {quoted_name(name)} is none of mlx-lm's lora_a, lora_b and m of a linear")


def _stack(module: str, part: str, experts: int) -> Converted:
    parent, _, leaf = module.rpartition(".")
    leaf = EXPERT_NAMES.get(leaf, leaf) if "block_sparse_moe" in module else leaf
    stem = parent.replace(STACKED, "experts")
    half = part[-1].upper()
    names = tuple(f"{stem}.{expert}.{leaf}.lora_{half}.weight" for expert in range(experts))
    return Converted(names, (False,) * experts, is_stack=True)
