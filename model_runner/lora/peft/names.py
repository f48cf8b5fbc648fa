"""Parses the names of an adapter's tensors, as PEFT's versions write them, into a module and a part of it.

    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight              a part "lora_A.weight"
    base_model.model.model.layers.0.self_attn.q_proj.lora_B.default.weight      with the adapter's name in it
    model.layers.0.self_attn.q_proj.base_layer.bias                             a tensor of the base that was trained
    model.language_model.layers.0.self_attn.q_proj.lora_A.weight                of the text part of a multimodal model

Parts are declared by formats and variants. Does not depend on shapes and values.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache

from engine.errors import AdapterError
from model_runner.lora.catalogue import Catalogue
from model_runner.lora.files.advice import ANOTHER_MODEL, MERGE, without_tensors
from model_runner.lora.files.quoted import quoted_name
from model_runner.lora.formats import registry
from model_runner.lora.variants.trained_tokens import TOKENS, TOKENS_BASE

WRAPPERS = frozenset({"base_layer", "modules_to_save", "original_module"})
"""Name components that PEFT inserts between a module's name and the name of the module's own tensor."""

OWN_TENSORS = ("weight", "bias")

TOKEN_MARKER = "token_adapter"
"""The first component of the parts of trained tokens, which end with the adapter's name."""

PREFIXES = ("base_model.model.", "base_model.", "module.", "")
MULTIMODAL_HEADS = (
    "language_model.",
    "model.language_model.",
    "language_model.model.",
    "model.language_model.model.",
    "text_model.",
    "model.text_model.",
)
HEADS = ("", "model.", *MULTIMODAL_HEADS)
"""The text before "layers" in tensor names of wrapped, bare and multimodal models."""

TRANSPARENT = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Name components that torch.compile, FSDP and activation checkpointing insert anywhere."""

OTHER_NAMES = {"unembed_tokens": "lm_head"}
"""Names of modules that trainers have of their own (tinker's head), with the model's."""


@dataclass(frozen=True)
class TensorName:
    """A parsed tensor name, with the model's name of the module.

    `prefixed` and `named`: whether it has PEFT's prefix and the adapter's name.
    """

    module: str
    part: str
    prefixed: bool
    named: bool


@cache
def markers() -> frozenset[str]:
    """Returns the first components of the parts of formats; the adapter's name and "weight" or "bias" may follow."""
    first = {part.partition(".")[0] for part in registry.known_parts()}
    return frozenset(first - {TOKEN_MARKER, *OWN_TENSORS})


@cache
def spellings() -> Mapping[str, str]:
    """Returns the other spellings of parts, each with the part that it refers to."""
    return {other: part for variant in registry.all_variants() for other, part in variant.spellings.items()}


def parse_name(tensor: str, catalogue: Catalogue) -> TensorName:
    """Parses the name of a tensor. Raises AdapterError for a name that no module or format uses."""
    pieces = [piece for piece in tensor.split(".") if piece not in TRANSPARENT]
    for piece in pieces:
        if piece in registry.refused_parts():
            raise AdapterError(
                f"tensor {quoted_name(tensor)} is not supported ({registry.refused_parts()[piece]}): {MERGE}"
            )
    at, part, names = _split(pieces)
    if len(names) > 1 or not part:
        raise AdapterError(
            f"tensor {quoted_name(tensor)} belongs to no format; nothing would use it: {without_tensors(pieces[-1])}"
        )
    module = find_module(".".join(pieces[:at]), catalogue)
    if module is None:
        raise _stranger(tensor, pieces[:at], catalogue)
    return TensorName(module, part, tensor.startswith(PREFIXES[0]), bool(names))


def _stranger(tensor: str, pieces: list[str], catalogue: Catalogue) -> AdapterError:
    """Returns the error for a tensor of a module that the model has not; it says what to do."""
    text = f"tensor {quoted_name(tensor)}: the model has no module {quoted_name('.'.join(pieces))}"
    known = {piece for module in [*catalogue.refs, *catalogue.fused, *catalogue.norms] for piece in module.split(".")}
    known |= {piece for head in (*PREFIXES, *HEADS) for piece in head.split(".")}
    unknown = [piece for piece in pieces if piece not in known]
    if not unknown or unknown[0].isdigit():
        return AdapterError(f"{text}: the adapter was made for another model; {ANOTHER_MODEL}")
    return AdapterError(f"{text}; to leave out what is not in this model, {without_tensors(unknown[0])}")


def spellings_of(module: str, catalogue: Catalogue, *, multimodal: bool) -> tuple[str, ...]:
    """Returns the names that a config may have for `module`: the model's own and that of transformers 5.

    `multimodal`: and those that it has inside of a multimodal model, whose adapter may change the text model only.
    """
    own = (module, catalogue.renamed_by_transformers(module))
    more = [head + name.removeprefix("model.") for head in MULTIMODAL_HEADS for name in own] if multimodal else []
    return tuple(dict.fromkeys([*own, *more]))


def find_module(written: str, catalogue: Catalogue) -> str | None:
    """Returns the model's own name of a module, given the adapter's name of it, or None if there is none."""
    start, dot, last = written.rpartition(".")
    written = start + dot + OTHER_NAMES.get(last, last)
    for prefix in PREFIXES:
        if written.startswith(prefix):
            bare = written.removeprefix(prefix)
            for head in HEADS:
                if bare.startswith(head):
                    rest = bare.removeprefix(head)
                    for name in (rest, f"model.{rest}"):
                        name = catalogue.renamed.get(name, name)
                        if catalogue.knows(name):
                            return name
    return None


def adapted_modules(tensors: Iterable[str], catalogue: Catalogue) -> set[str]:
    """Returns the modules, fused or not, that have a format's tensors; other tensors are ignored."""
    written = set()
    for tensor in tensors:
        pieces = [piece for piece in tensor.split(".") if piece not in TRANSPARENT]
        at = next((index for index, piece in enumerate(pieces) if piece in markers()), 0)
        written.add(".".join(pieces[:at]))
    found = {find_module(module, catalogue) for module in written}
    return {module for module in found if module is not None}


def _split(pieces: list[str]) -> tuple[int, str, list[str]]:
    """Returns the index where the part begins, the part ("": none), and the pieces in place of an adapter's name."""
    begins = markers() | WRAPPERS | {TOKEN_MARKER}
    at = next((index for index, piece in enumerate(pieces) if piece in begins), None)
    if at is None:
        last = pieces[-1]
        return len(pieces) - 1, last if last in OWN_TENSORS else "", []
    if pieces[at] == TOKEN_MARKER:
        return at, *_token_part(pieces[at:])
    rest = pieces[at + 1 :]
    own = rest.pop() if rest and rest[-1] in OWN_TENSORS else ""
    return at, _part(pieces[at], own), rest


def _token_part(pieces: list[str]) -> tuple[str, list[str]]:
    """Returns the part of trained tokens, and the adapter's name after it."""
    for part in (TOKENS, TOKENS_BASE):
        known = part.split(".")
        if pieces[: len(known)] == known:
            return part, pieces[len(known) :]
    return "", []


def _part(marker: str, own: str) -> str:
    """Returns the part, such as lora_A.weight, lora_E, bias or base_layer.weight."""
    if marker in WRAPPERS:
        return f"{marker}.{own}" if own == "weight" else own
    written = f"{marker}.{own}" if own else marker
    return spellings().get(written, written)
