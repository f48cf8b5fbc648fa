"""Maps the tensors of each module to what they become, and checks all names and shapes before any data is read.

    q_proj    lora_A.weight, lora_B.weight     -> A and B, by the format
              lora_magnitude_vector            -> a gain (DoRA)
              lora_B.bias, bias                -> a bias (lora_bias; bias="all" or "lora_only")
    lm_head   weight                           -> a full matrix, which may be of another vocabulary
              base_layer.weight, lora_A, ..    -> a full matrix, if the base_layer is of another vocabulary
              token_adapter...                 -> a full matrix: the base's with some rows replaced

Does not depend on the values of tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from engine.errors import AdapterError
from model_runner.lora.catalogue import EMBEDDING_AND_HEAD, Catalogue, SiteRef
from model_runner.lora.files.adapter_config import CONFIG_NAME
from model_runner.lora.files.advice import MERGE, with_option
from model_runner.lora.files.quoted import quoted_name
from model_runner.lora.files.tensor_file import FLOATS, Entry
from model_runner.lora.formats.base import PeftFormat
from model_runner.lora.normal_form import MAX_RANK
from model_runner.lora.peft.config import PeftConfig
from model_runner.lora.peft.tensor_owners import TensorOwners
from model_runner.lora.target_module import Module, Shape, Target, Term, missing
from model_runner.lora.variants.base import Variant
from model_runner.lora.variants.biases import BIAS
from model_runner.lora.variants.saved_modules import BASE_WEIGHT, FULL_WEIGHT, ORIGINAL, SAVED_COPY
from model_runner.lora.variants.trained_tokens import TOKENS, TOKENS_BASE, TrainedTokens


@dataclass(frozen=True, eq=False)
class TensorMapping:
    """One module that the adapter changes: its tensors by part, the slices of its sites, and what it becomes.

    `format` is None for a module that is not targeted; `variants` are those that have parts here. `rank` is the rank
    in the normal form. `rows` is the number of rows of a full matrix with another vocabulary than the base's, else 0.
    `tokens` are the tokens with their own trained rows.
    """

    module: Module
    refs: tuple[SiteRef, ...]
    format: PeftFormat | None
    variants: tuple[Variant, ...]
    parts: dict[str, str]
    becomes: frozenset[Term]
    rank: int
    rows: int = 0
    tokens: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """The full name of the module."""
        return self.module.target.module

    @property
    def has_gain(self) -> bool:
        """Whether the adapter scales output columns of the module."""
        return "gain" in self.becomes

    @property
    def has_bias(self) -> bool:
        """Whether the adapter adds a bias to output columns of the module."""
        return "bias" in self.becomes

    @property
    def has_full_weight(self) -> bool:
        """Whether the adapter brings a full weight that replaces the base's."""
        return "full weight" in self.becomes


@dataclass(frozen=True, eq=False)
class TensorMapper:
    """Maps the tensors of one adapter. Errors are AdapterErrors that name the tensor or module at fault."""

    entries: Mapping[str, Entry]
    config: PeftConfig
    targets: Mapping[str, Target]
    catalogue: Catalogue
    notes: list[str]

    def map(self) -> list[TensorMapping]:
        """Returns the mappings of all modules of the adapter, in the model's order."""
        owned = TensorOwners(self.entries, self.config, self.targets, self.catalogue, self.notes).group()
        known = [*self.catalogue.refs, *self.catalogue.fused, *self.catalogue.norms]
        modules = [module for module in known if module in owned or module in self.targets]
        mappings = [self._module(module, owned.get(module, {})) for module in modules]
        self._check_vocabularies(mappings)
        return mappings

    def _module(self, name: str, parts: dict[str, str]) -> TensorMapping:
        refs = self.catalogue.find(name)
        target = self.targets.get(name, Target(name, 0, 0.0))
        out = sum(ref.out_features for ref in refs)
        module = Module(target, refs[0].in_features, out, refs[0].site.embeds)
        found = {part: self.entries[tensor].shape for part, tensor in parts.items()}
        matrix, rows = self._matrix(module, found)
        if rows:
            module = replace(module, in_features=rows) if module.embeds else replace(module, out_features=rows)
        form = self.config.format if name in self.targets else None
        tokens = self._tokens(module, parts, matrix)
        wanted = self._wanted_full(module, parts, matrix, tokens) | ({BIAS: [out]} if BIAS in parts else {})
        rank = 0
        if form is not None:
            wanted |= self._wanted_of(form, module, found)
            rank = form.rank(module, found)
        self._check_parts(module, parts, wanted)
        if rank > MAX_RANK:
            raise AdapterError(
                f"module {name}: {self.config.name} of rank {target.rank} is served as rank {rank};"
                f" at most {MAX_RANK} is: {MERGE}"
            )
        variants = tuple(variant for variant in self.config.variants if variant.parts & parts.keys())
        becomes = _becomes(form, variants, parts, rows)
        if becomes >= {"bias", "full weight"}:
            raise AdapterError(f"module {name} has a bias beside a weight of its own: only one can be served")
        return TensorMapping(module, refs, form, variants, parts, becomes, 0 if rows else rank, rows, tokens)

    def _matrix(self, module: Module, found: Mapping[str, Shape]) -> tuple[Shape, int]:
        """Returns the shape of the module's full weight, and its rows if it has another vocabulary, else 0."""
        name = module.target.module
        if name in self.catalogue.norms:
            return [module.out_features], 0
        shape = [module.out_features, module.in_features]
        if module.embeds:
            shape.reverse()
        rows = _own_rows(found, shape) if name in EMBEDDING_AND_HEAD else 0
        return [rows or shape[0], shape[1]], rows

    def _wanted_full(
        self, module: Module, parts: Mapping[str, str], matrix: Shape, tokens: tuple[int, ...]
    ) -> dict[str, Shape]:
        """Returns the required shapes of full weights and of trained tokens."""
        name = module.target.module
        if name in self.targets and FULL_WEIGHT in parts:
            raise AdapterError(f"module {name} is targeted, and it is in modules_to_save: only one can be served")
        full_parts = [BASE_WEIGHT, FULL_WEIGHT, SAVED_COPY, ORIGINAL, TOKENS_BASE]
        if name in self.catalogue.norms:
            full_parts = [FULL_WEIGHT]
        wanted = {part: matrix for part in full_parts if part in parts}
        if TOKENS in parts or TOKENS_BASE in parts:
            if name in self.targets or FULL_WEIGHT in parts:
                raise AdapterError(f"module {name} has trained tokens beside other changes: only one can be served")
            wanted[TOKENS] = [len(tokens), matrix[1]]
        return wanted

    def _wanted_of(self, form: PeftFormat, module: Module, found: Mapping[str, Shape]) -> dict[str, Shape]:
        """Returns the required shapes of the parts of the format and its variants."""
        return form.shapes(module, found) | {part: [module.out_features] for part in self.config.required_parts}

    def _check_parts(self, module: Module, parts: Mapping[str, str], wanted: Mapping[str, Shape]) -> None:
        """Raises AdapterError for a part that is missing, of another shape or dtype, or not used."""
        for part, shape in wanted.items():
            if part not in parts:
                raise missing(module, part, {found: self.entries[tensor].shape for found, tensor in parts.items()})
            _check_entry(parts[part], self.entries[parts[part]], shape, module.target.rank)
        for part in sorted(parts.keys() - wanted.keys()):
            raise AdapterError(f"tensor {quoted_name(parts[part])} has no use beside the others of its module")

    def _tokens(self, module: Module, parts: Mapping[str, str], matrix: Shape) -> tuple[int, ...]:
        """Returns the tokens that have their own rows. Raises AdapterError for one outside of the vocabulary."""
        variant = self.config.variant(TrainedTokens)
        if variant is None or TOKENS not in parts:
            return ()
        variant.check_tokens(module.target.module, matrix[0])
        return variant.tokens_of(module.target.module)

    def _check_vocabularies(self, mappings: list[TensorMapping]) -> None:
        """Raises AdapterError if embedding and head differ in vocabulary: a token would lack one of them."""
        rows = {mapping.name: mapping.rows for mapping in mappings if mapping.rows}
        if not rows or {rows.get(module) for module in EMBEDDING_AND_HEAD} == set(rows.values()):
            return
        first = next(mapping for mapping in mappings if mapping.rows)
        tensor = next(first.parts[part] for part in (FULL_WEIGHT, BASE_WEIGHT, TOKENS_BASE) if part in first.parts)
        base = self.catalogue.refs[first.name][0].site.vocabulary
        sizes = " and ".join(f"{rows.get(module, base)} for {module}" for module in EMBEDDING_AND_HEAD)
        raise AdapterError(
            f"tensor {quoted_name(tensor)} is for a vocabulary of {first.rows} tokens, which makes {sizes}: embedding"
            " and head must be saved together, as PEFT does with save_embedding_layers=True"
        )


def _becomes(
    form: PeftFormat | None, variants: Iterable[Variant], parts: Mapping[str, str], rows: int
) -> frozenset[Term]:
    """Returns the terms of the normal form. A matrix of another vocabulary absorbs A, B and the gain."""
    terms = set(form.becomes if form is not None else ()).union(*(variant.becomes for variant in variants))
    if rows:
        terms -= {"A", "B", "gain"}
    if rows or FULL_WEIGHT in parts:
        terms.add("full weight")
    return frozenset(terms)


def _own_rows(found: Mapping[str, Shape], expected: Shape) -> int:
    """Returns the rows of a matrix of another vocabulary, of the embedding or the head, or 0 if there is none."""
    shapes = [found[part] for part in (FULL_WEIGHT, BASE_WEIGHT, TOKENS_BASE) if part in found]
    others = [shape[0] for shape in shapes if len(shape) == 2 and shape[1] == expected[1] and shape[0] != expected[0]]
    return others[0] if others else 0


def _check_entry(tensor: str, entry: Entry, expected: Shape, rank: int) -> None:
    if entry.dtype not in FLOATS:
        raise AdapterError(f"tensor {quoted_name(tensor)} has dtype {entry.dtype}; served are {', '.join(FLOATS)}")
    if entry.shape != expected:
        reason = f"rank {rank} by {CONFIG_NAME}"
        differing = [own for own, other in zip(entry.shape, expected, strict=False) if own != other]
        if len(entry.shape) == len(expected) and len(differing) == 1 and rank in expected and differing[0] <= MAX_RANK:
            reason += f"; {with_option('r', str(differing[0]))} if that is its rank"
        if 0 in entry.shape:
            reason = "it is empty, as DeepSpeed's ZeRO-3 leaves it: save it with its parameters gathered"
        raise AdapterError(f"tensor {quoted_name(tensor)} has shape {entry.shape}, expected {expected} ({reason})")
