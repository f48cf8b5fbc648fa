"""Where each tensor of a PEFT adapter lands: every name and shape accounted for before any data is read.

    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight             [r, in]
    base_model.model.model.layers.0.self_attn.q_proj.lora_B.default.weight     [out, r], with the adapter's name in it

Knows nothing of values.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from engine.errors import AdapterError
from model_runner.lora.catalogue import Catalogue, Place
from model_runner.lora.formats.peft_config import CONFIG_NAME
from model_runner.lora.formats.targets import Target
from model_runner.lora.formats.tensor_file import FLOATS, Entry

NAME = re.compile(
    r"(?P<prefix>base_model\.model\.)?(?P<module>.+)\.lora_(?P<half>[AB])(?:\.(?P<adapter>[^.]+))?\.weight"
)

UNSUPPORTED = {
    ".lora_magnitude_vector": "DoRA",
    ".lora_embedding_": "LoRA on the embedding",
    ".lora_B.bias": "biases on lora_B",
    ".modules_to_save.": "whole modules beside the LoRA",
    ".lora_diag": "KaSA",
    ".lora_E": "AdaLoRA",
}
"""Parts of names that tell which unsupported option a tensor belongs to."""


@dataclass(frozen=True)
class Landing:
    """One targeted module and the names of its two tensors."""

    target: Target
    place: Place
    a: str
    b: str


def land(entries: Mapping[str, Entry], targets: Mapping[str, Target], catalogue: Catalogue) -> list[Landing]:
    """All modules of the adapter, in the model's order. Raises AdapterError naming the tensor or module at fault."""
    halves: dict[tuple[str, str], str] = {}
    for tensor in entries:
        key = _land_name(tensor, targets, catalogue)
        if key in halves:
            raise AdapterError(f"tensors {show(halves[key])} and {show(tensor)} are the same part of one module")
        halves[key] = tensor
    landings = [_pair(target, catalogue.places[module], halves) for module, target in targets.items()]
    for landing in landings:
        rank, place = landing.target.rank, landing.place
        _check(landing.a, entries[landing.a], [rank, place.in_features], rank)
        _check(landing.b, entries[landing.b], [place.out_features, rank], rank)
    return landings


def _land_name(tensor: str, targets: Mapping[str, Target], catalogue: Catalogue) -> tuple[str, str]:
    for mark, what in UNSUPPORTED.items():
        if mark in tensor:
            raise AdapterError(f"tensor {show(tensor)} is not supported yet ({what})")
    found = NAME.fullmatch(tensor)
    if found is None:
        raise AdapterError(f"tensor {show(tensor)} is no lora_A or lora_B weight; nothing would use it")
    module = found["module"]
    if module in catalogue.outside:
        raise AdapterError(f"tensor {show(tensor)} is not supported yet (LoRA on the embedding or the head)")
    if module not in catalogue.places:
        raise AdapterError(f"tensor {show(tensor)}: the model has no module {show(module)}")
    if module not in targets:
        raise AdapterError(f"tensor {show(tensor)}: {CONFIG_NAME} does not target {module}")
    return module, found["half"]


def _pair(target: Target, place: Place, halves: Mapping[tuple[str, str], str]) -> Landing:
    a, b = halves.get((target.module, "A")), halves.get((target.module, "B"))
    if a is None and b is None:
        raise AdapterError(f"module {target.module} is targeted by {CONFIG_NAME}, but it has no tensors")
    if a is None or b is None:
        missing = "lora_A" if a is None else "lora_B"
        raise AdapterError(f"tensor {show(a or b or '')} has no {missing} beside it")
    return Landing(target, place, a, b)


def _check(tensor: str, entry: Entry, expected: list[int], rank: int) -> None:
    if entry.dtype not in FLOATS:
        raise AdapterError(f"tensor {show(tensor)} has dtype {entry.dtype}; served are {', '.join(FLOATS)}")
    if entry.shape != expected:
        raise AdapterError(
            f"tensor {show(tensor)} has shape {entry.shape}, expected {expected} (rank {rank} by {CONFIG_NAME})"
        )


def show(name: str) -> str:
    """A name from a file, quoted and clipped, fit for one line."""
    return repr(name if len(name) <= 200 else name[:197] + "...")
