"""Where each tensor of a PEFT adapter lands: every name and shape accounted for before any data is read.

    q_proj    lora_A.weight, lora_B.weight     -> its format: LoRA
              lora_magnitude_vector            -> a gain (DoRA)
              lora_B.bias, bias                -> a bias (lora_bias; bias="all" or "lora_only")
    lm_head   weight                           -> a whole matrix, perhaps of another vocabulary
              base_layer.weight, lora_A, ..    -> the same, where that is of another vocabulary
              token_adapter...                 -> the same, the base's but for some rows

Knows nothing of values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from engine.errors import AdapterError
from model_runner.lora.catalogue import OUTSIDE, Catalogue, SiteRef
from model_runner.lora.files.tensor_file import FLOATS, Entry
from model_runner.lora.formats.adalora import AdaLora
from model_runner.lora.formats.base import Format, Module, Shape, Target, missing
from model_runner.lora.formats.loha import LoHa
from model_runner.lora.formats.lokr import LoKr
from model_runner.lora.formats.lora import Lora
from model_runner.lora.normal_form import MAX_RANK
from model_runner.lora.peft.config import CONFIG_NAME, PeftConfig
from model_runner.lora.peft.names import COPY, ORIGINAL, TOKENS, TOKENS_BASE, parse, show
from model_runner.lora.peft.targets import ends

FORMATS: dict[str, Format] = {"LORA": Lora(), "ADALORA": AdaLora(), "LOHA": LoHa(), "LOKR": LoKr()}
"""By PEFT's name of the type."""

MAGNITUDE = "lora_magnitude_vector"
LORA_BIAS = "lora_B.bias"
BIAS = "bias"
BASE_WEIGHT = "base_layer.weight"
WHOLE = "weight"


@dataclass(frozen=True, eq=False)
class TensorMapping:
    """One module that the adapter changes: its tensors by part, and where they go.

    `format` is None for a module of which only the bias was trained; `rank` is that of the normal form. `rows` are
    those of a whole matrix where they are not as many as the base's: a vocabulary of its own.
    """

    module: Module
    places: tuple[SiteRef, ...]
    format: Format | None
    parts: dict[str, str]
    rank: int
    rows: int = 0
    tokens: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """The full name of the module."""
        return self.module.target.module

    @property
    def has_gain(self) -> bool:
        """Whether columns are scaled."""
        return MAGNITUDE in self.parts and not self.rows

    @property
    def has_whole(self) -> bool:
        """Whether it brings a matrix of its own."""
        return bool(self.rows) or WHOLE in self.parts or TOKENS in self.parts

    @property
    def has_bias(self) -> bool:
        """Whether something is added to columns."""
        return LORA_BIAS in self.parts or BIAS in self.parts


def land(
    entries: Mapping[str, Entry], config: PeftConfig, targets: Mapping[str, Target], catalogue: Catalogue
) -> list[TensorMapping]:
    """All modules of the adapter, in the model's order. Raises AdapterError naming the tensor or module at fault."""
    owned: dict[str, dict[str, str]] = {}
    for tensor in entries:
        name = parse(tensor, catalogue)
        _check_belongs(tensor, name.module, name.part, config, targets, catalogue)
        parts = owned.setdefault(name.module, {})
        if name.part in parts:
            raise AdapterError(f"tensors {show(parts[name.part])} and {show(tensor)} are the same part of one module")
        parts[name.part] = tensor
    for parts in owned.values():
        if COPY in parts and WHOLE not in parts:
            parts[WHOLE] = parts.pop(COPY)
    for trained in _token_modules(config):
        if not any(ends(module, trained) for module in owned if TOKENS in owned[module]):
            raise AdapterError(f"{CONFIG_NAME}: trainable_token_indices means {trained}, which has no tensor for them")
    _tie(owned, entries, targets, catalogue)
    for saved in config.modules_to_save or []:
        if not any(module.endswith(saved) for module in owned if WHOLE in owned[module]):
            raise AdapterError(f"{CONFIG_NAME}: modules_to_save names {saved!r}, which has no tensor that fits")
    for module in catalogue.norms:
        if module not in owned and _saved(module, config):
            raise AdapterError(f"{CONFIG_NAME}: modules_to_save means {module} too, which has no tensor")
    known = [*catalogue.places, *catalogue.fused, *catalogue.norms]
    modules = [module for module in known if module in owned or module in targets]
    mappings = [_land(module, owned.get(module, {}), entries, config, targets, catalogue) for module in modules]
    _check_vocabularies(mappings, catalogue)
    return mappings


def _saved(module: str, config: PeftConfig) -> bool:
    """Whether `modules_to_save` means this module: PEFT takes whatever ends so, even inside a word."""
    return module.endswith(tuple(config.modules_to_save or ()))


def _check_belongs(
    tensor: str, module: str, part: str, config: PeftConfig, targets: Mapping[str, Target], catalogue: Catalogue
) -> None:
    """Raises AdapterError for a tensor that the config does not speak of."""
    if module in catalogue.norms and part == BIAS:
        raise AdapterError(f"tensor {show(tensor)}: {module} of the model has no bias")
    if part == BIAS:
        if config.bias == "none":
            raise AdapterError(f"tensor {show(tensor)}: {CONFIG_NAME} says bias='none'")
        return
    if part == BASE_WEIGHT and module in targets:
        return
    if part == WHOLE and module in OUTSIDE:  # trained, or saved because the vocabulary was resized
        return
    if part in (COPY, ORIGINAL) and module in OUTSIDE and config.modules_to_save:
        return
    if part in (TOKENS, TOKENS_BASE) and module in OUTSIDE and trained_tokens(config, module):
        return
    if part in (WHOLE, COPY) and module in catalogue.norms and _saved(module, config):
        return
    if part in (WHOLE, BASE_WEIGHT, COPY, ORIGINAL):
        raise AdapterError(
            f"tensor {show(tensor)} replaces a whole module; served are {', '.join(OUTSIDE)} and norms in"
            " modules_to_save"
        )
    if part not in FORMATS[config.peft_type].parts | _extras(config):
        raise AdapterError(f"tensor {show(tensor)} is no part of {_kind(config)}; nothing would use it")
    if module not in targets:
        raise AdapterError(f"tensor {show(tensor)}: {CONFIG_NAME} does not target {module}")


def _extras(config: PeftConfig) -> set[str]:
    return {part for part, used in ((MAGNITUDE, config.use_dora), (LORA_BIAS, config.lora_bias)) if used}


def _kind(config: PeftConfig) -> str:
    return "DoRA" if config.use_dora else FORMATS[config.peft_type].name


def _tie(
    owned: dict[str, dict[str, str]],
    entries: Mapping[str, Entry],
    targets: Mapping[str, Target],
    catalogue: Catalogue,
) -> None:
    """A head that is tied to the embedding, and of which nothing was saved, is what was saved of the embedding."""
    embed, head = OUTSIDE
    parts = owned.get(embed, {})
    if head not in catalogue.places or head in owned or head in targets:
        return
    site = catalogue.places[head][0].site
    if not site.tied:
        return
    if TOKENS in parts:
        owned[head] = {part: parts[part] for part in (TOKENS, TOKENS_BASE) if part in parts}
    elif BASE_WEIGHT in parts and entries[parts[BASE_WEIGHT]].shape[:1] != [site.vocabulary]:
        owned[head] = {WHOLE: parts[BASE_WEIGHT]}


def _token_modules(config: PeftConfig) -> list[str]:
    """What `trainable_token_indices` means; a list: the embedding."""
    indices = config.trainable_token_indices
    return list(indices) if isinstance(indices, dict) else ["embed_tokens"] if indices else []


def trained_tokens(config: PeftConfig, module: str) -> tuple[int, ...]:
    """The tokens of which `module` has rows of its own, in the order of these rows.

    A list means the embedding, and the head where it is tied to it.
    """
    indices = config.trainable_token_indices or []
    if isinstance(indices, list):
        return tuple(indices)
    found = [tokens for name, tokens in indices.items() if ends(module, name)] or list(indices.values())
    return tuple(found[0]) if len(found) == 1 else ()


def _land(
    name: str,
    parts: dict[str, str],
    entries: Mapping[str, Entry],
    config: PeftConfig,
    targets: Mapping[str, Target],
    catalogue: Catalogue,
) -> TensorMapping:
    places = catalogue.find(name)
    target = targets.get(name, Target(name, 0, 0.0))
    out = sum(place.out_features for place in places)
    module = Module(target, places[0].in_features, out, places[0].site.embeds)
    found = {part: entries[tensor].shape for part, tensor in parts.items()}
    wanted: dict[str, Shape] = {BIAS: [out]} if BIAS in parts else {}
    matrix = [module.in_features, out] if module.embeds else [out, module.in_features]
    wholes = [BASE_WEIGHT, WHOLE, COPY, ORIGINAL, TOKENS_BASE]
    if name in catalogue.norms:
        matrix, wholes = [out], [WHOLE]
    own = _own_rows(name, found, matrix)
    if own:
        matrix[0] = own
        module = replace(module, in_features=own) if module.embeds else replace(module, out_features=own)
    wanted |= {part: matrix for part in wholes if part in parts}
    if name in targets and WHOLE in parts:
        raise AdapterError(f"module {name} is targeted, and it is in modules_to_save: only one can be served")
    tokens = _tokens(name, config, matrix[0]) if TOKENS in parts else ()
    if tokens:
        if name in targets or WHOLE in parts:
            raise AdapterError(f"module {name} has trained tokens beside other changes: only one can be served")
        wanted[TOKENS] = [len(tokens), matrix[1]]
    chosen, rank = None, 0
    if name in targets:
        chosen = FORMATS[config.peft_type]
        if not chosen.parts & found.keys():
            raise AdapterError(f"module {name} is targeted by {CONFIG_NAME}, but it has no tensors")
        wanted |= chosen.shapes(module, found) | {part: [module.out_features] for part in _extras(config)}
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
    return TensorMapping(module, places, chosen, parts, 0 if own else rank, own, tokens)


def _own_rows(module: str, found: Mapping[str, Shape], expected: Shape) -> int:
    """The rows of a matrix of the embedding or the head that is of another vocabulary; 0: there is none."""
    shapes = [found[part] for part in (WHOLE, BASE_WEIGHT, TOKENS_BASE) if part in found] if module in OUTSIDE else []
    others = [shape[0] for shape in shapes if len(shape) == 2 and shape[1] == expected[1] and shape[0] != expected[0]]
    return others[0] if others else 0


def _tokens(module: str, config: PeftConfig, vocabulary: int) -> tuple[int, ...]:
    """The trained tokens. Raises AdapterError for what is no token of the vocabulary."""
    tokens = trained_tokens(config, module)
    if len(set(tokens)) < len(tokens) or not 0 <= min(tokens) <= max(tokens) < vocabulary:
        raise AdapterError(
            f"{CONFIG_NAME}: trainable_token_indices are not different tokens of a vocabulary of {vocabulary}"
        )
    return tokens


def _check_vocabularies(mappings: list[TensorMapping], catalogue: Catalogue) -> None:
    """Raises AdapterError where embedding and head are not of one vocabulary: a token would lack one of them."""
    own = {mapping.name: mapping.rows for mapping in mappings if mapping.rows}
    if not own or {own.get(module) for module in OUTSIDE} == set(own.values()):
        return
    first = next(mapping for mapping in mappings if mapping.rows)
    tensor = next(first.parts[part] for part in (WHOLE, BASE_WEIGHT, TOKENS_BASE) if part in first.parts)
    base = catalogue.places[first.name][0].site.vocabulary
    sizes = " and ".join(f"{own.get(module, base)} for {module}" for module in OUTSIDE)
    raise AdapterError(
        f"tensor {show(tensor)} is for a vocabulary of {first.rows} tokens, which makes {sizes}: embedding and head"
        " must be saved together, as PEFT does with save_embedding_layers=True"
    )


def _check(tensor: str, entry: Entry, expected: Shape, rank: int) -> None:
    if entry.dtype not in FLOATS:
        raise AdapterError(f"tensor {show(tensor)} has dtype {entry.dtype}; served are {', '.join(FLOATS)}")
    if entry.shape != expected:
        raise AdapterError(
            f"tensor {show(tensor)} has shape {entry.shape}, expected {expected} (rank {rank} by {CONFIG_NAME})"
        )
