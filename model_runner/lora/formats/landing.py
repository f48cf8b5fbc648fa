"""Where each tensor of a PEFT adapter lands: every name and shape accounted for before any data is read.

    q_proj    lora_A.weight, lora_B.weight     -> its format: LoRA
              lora_magnitude_vector            -> a gain (DoRA)
              lora_B.bias, bias                -> a bias (lora_bias; bias="all" or "lora_only")

Knows nothing of values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from engine.errors import AdapterError
from model_runner.lora.adapter import MAX_RANK
from model_runner.lora.catalogue import OUTSIDE, Catalogue, Place
from model_runner.lora.formats.adalora import AdaLora
from model_runner.lora.formats.format import Format, Module, Shape, missing
from model_runner.lora.formats.loha import LoHa
from model_runner.lora.formats.lokr import LoKr
from model_runner.lora.formats.lora import Lora
from model_runner.lora.formats.names import parse, show
from model_runner.lora.formats.peft_config import CONFIG_NAME, PeftConfig
from model_runner.lora.formats.targets import Target, ends
from model_runner.lora.formats.tensor_file import FLOATS, Entry

FORMATS: dict[str, Format] = {"LORA": Lora(), "ADALORA": AdaLora(), "LOHA": LoHa(), "LOKR": LoKr()}
"""By PEFT's name of the type."""

MAGNITUDE = "lora_magnitude_vector"
LORA_BIAS = "lora_B.bias"
BIAS = "bias"
BASE_WEIGHT = "base_layer.weight"
WHOLE = "weight"


@dataclass(frozen=True, eq=False)
class Landing:
    """One module that the adapter changes: its tensors by part, and where they go.

    `format` is None for a module of which only the bias was trained; `rank` is that of the normal form.
    """

    module: Module
    places: tuple[Place, ...]
    format: Format | None
    parts: dict[str, str]
    rank: int

    @property
    def name(self) -> str:
        """The full name of the module."""
        return self.module.target.module

    @property
    def has_gain(self) -> bool:
        """Whether columns are scaled."""
        return MAGNITUDE in self.parts

    @property
    def has_whole(self) -> bool:
        """Whether it brings a matrix of its own."""
        return WHOLE in self.parts

    @property
    def has_bias(self) -> bool:
        """Whether something is added to columns."""
        return LORA_BIAS in self.parts or BIAS in self.parts


def land(
    entries: Mapping[str, Entry], config: PeftConfig, targets: Mapping[str, Target], catalogue: Catalogue
) -> list[Landing]:
    """All modules of the adapter, in the model's order. Raises AdapterError naming the tensor or module at fault."""
    owned: dict[str, dict[str, str]] = {}
    for tensor in entries:
        name = parse(tensor, catalogue)
        _check_belongs(tensor, name.module, name.part, config, targets)
        parts = owned.setdefault(name.module, {})
        if name.part in parts:
            raise AdapterError(f"tensors {show(parts[name.part])} and {show(tensor)} are the same part of one module")
        parts[name.part] = tensor
    for saved in config.modules_to_save or []:
        if not any(ends(module, saved) for module in owned if WHOLE in owned[module]):
            raise AdapterError(f"{CONFIG_NAME}: modules_to_save names {saved!r}, which has no tensor that fits")
    modules = [module for module in [*catalogue.places, *catalogue.fused] if module in owned or module in targets]
    return [_land(module, owned.get(module, {}), entries, config, targets, catalogue) for module in modules]


def _check_belongs(tensor: str, module: str, part: str, config: PeftConfig, targets: Mapping[str, Target]) -> None:
    """Raises AdapterError for a tensor that the config does not speak of."""
    if part == BIAS:
        if config.bias == "none":
            raise AdapterError(f"tensor {show(tensor)}: {CONFIG_NAME} says bias='none'")
        return
    if part == BASE_WEIGHT and module in targets:
        return
    if part == WHOLE and module in OUTSIDE and config.modules_to_save:
        return
    if part in (WHOLE, BASE_WEIGHT):
        raise AdapterError(
            f"tensor {show(tensor)} replaces a whole module; served are {' and '.join(OUTSIDE)} in modules_to_save"
        )
    if part not in FORMATS[config.peft_type].parts | _extras(config):
        raise AdapterError(f"tensor {show(tensor)} is no part of {_kind(config)}; nothing would use it")
    if module not in targets:
        raise AdapterError(f"tensor {show(tensor)}: {CONFIG_NAME} does not target {module}")


def _extras(config: PeftConfig) -> set[str]:
    return {part for part, used in ((MAGNITUDE, config.use_dora), (LORA_BIAS, config.lora_bias)) if used}


def _kind(config: PeftConfig) -> str:
    return "DoRA" if config.use_dora else FORMATS[config.peft_type].name


def _land(
    name: str,
    parts: dict[str, str],
    entries: Mapping[str, Entry],
    config: PeftConfig,
    targets: Mapping[str, Target],
    catalogue: Catalogue,
) -> Landing:
    places = catalogue.find(name)
    target = targets.get(name, Target(name, 0, 0.0))
    out = sum(place.out_features for place in places)
    module = Module(target, places[0].in_features, out, places[0].site.embeds)
    found = {part: entries[tensor].shape for part, tensor in parts.items()}
    wanted: dict[str, Shape] = {BIAS: [out]} if BIAS in parts else {}
    matrix = [module.in_features, out] if module.embeds else [out, module.in_features]
    wanted |= {part: matrix for part in (BASE_WEIGHT, WHOLE) if part in parts}
    if name in targets and WHOLE in parts:
        raise AdapterError(f"module {name} is targeted, and it is in modules_to_save: only one can be served")
    _check_vocabulary(parts, found, matrix)
    chosen, rank = None, 0
    if name in targets:
        chosen = FORMATS[config.peft_type]
        if not chosen.parts & found.keys():
            raise AdapterError(f"module {name} is targeted by {CONFIG_NAME}, but it has no tensors")
        wanted |= chosen.shapes(module, found) | {part: [out] for part in _extras(config)}
        rank = chosen.rank(module, found)
    for part, shape in wanted.items():
        if part not in parts:
            raise missing(module, part, found)
        _check(parts[part], entries[parts[part]], shape, target.rank)
    for part in sorted(found.keys() - wanted.keys()):
        raise AdapterError(f"tensor {show(parts[part])} has no use beside the others of its module")
    if rank > MAX_RANK:
        raise AdapterError(
            f"module {name}: {_kind(config)} of rank {target.rank} is served as rank {rank}; at most {MAX_RANK} is"
        )
    return Landing(module, places, chosen, parts, rank)


def _check_vocabulary(parts: Mapping[str, str], found: Mapping[str, Shape], expected: Shape) -> None:
    """Raises AdapterError for a whole matrix of another vocabulary."""
    for part in (BASE_WEIGHT, WHOLE):
        shape = found.get(part, expected)
        if len(shape) == 2 and shape[0] != expected[0] and shape[1] == expected[1]:
            raise AdapterError(
                f"tensor {show(parts[part])} is for a vocabulary of {shape[0]} tokens and the model's has"
                f" {expected[0]}: added tokens are not supported"
            )


def _check(tensor: str, entry: Entry, expected: Shape, rank: int) -> None:
    if entry.dtype not in FLOATS:
        raise AdapterError(f"tensor {show(tensor)} has dtype {entry.dtype}; served are {', '.join(FLOATS)}")
    if entry.shape != expected:
        raise AdapterError(
            f"tensor {show(tensor)} has shape {entry.shape}, expected {expected} (rank {rank} by {CONFIG_NAME})"
        )
