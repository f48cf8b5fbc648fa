"""The names of an adapter's tensors, in every dialect of PEFT's versions: which module, and which part of it.

    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight              a part "lora_A.weight"
    base_model.model.model.layers.0.self_attn.q_proj.lora_B.default.weight      with the adapter's name in it
    model.layers.0.self_attn.q_proj.base_layer.bias                             a tensor of the base that was trained

Knows nothing of shapes and values.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from engine.errors import AdapterError
from model_runner.lora.catalogue import Catalogue

MARKERS = frozenset({
    "lora_A",
    "lora_B",
    "lora_E",
    "ranknum",
    "lora_embedding_A",
    "lora_embedding_B",
    "lora_magnitude_vector",
    "hada_w1_a",
    "hada_w1_b",
    "hada_w2_a",
    "hada_w2_b",
    "hada_t1",
    "hada_t2",
    "lokr_w1",
    "lokr_w1_a",
    "lokr_w1_b",
    "lokr_w2",
    "lokr_w2_a",
    "lokr_w2_b",
    "lokr_t2",
})  # fmt: skip
"""Name the part they begin; an adapter's name and "weight" or "bias" may follow."""

WRAPPERS = frozenset({"base_layer", "modules_to_save", "original_module"})
"""Stand between a module and a tensor of its own."""

OWN = ("weight", "bias")

ORIGINAL = "original_module.weight"
"""What a module in modules_to_save was before training: PEFT saves it where the vocabulary was resized."""

COPY = "modules_to_save.weight"
"""The trained one once more, saved beside it then."""

TOKENS = "token_adapter.trainable_tokens_delta"
"""Rows that stand in for those of trained tokens."""

TOKENS_BASE = "token_adapter.base_layer.weight"
"""All rows, of which those are some: saved where the vocabulary was resized."""

TOKEN_MARKER = "token_adapter"

UNSUPPORTED = {
    "lora_diag": "KaSA",
}
"""Components that tell which unsupported option a tensor belongs to."""

PREFIXES = ("base_model.model.", "base_model.", "module.", "")
HEADS = ("", "model.", "language_model.", "model.language_model.", "language_model.model.")
"""What stands before "layers" in files of wrapped, bare and multimodal models."""


@dataclass(frozen=True)
class Name:
    """`module` as the model knows it; `prefixed` and `named` say in which dialect it was written."""

    module: str
    part: str
    prefixed: bool
    named: bool


def parse(tensor: str, catalogue: Catalogue) -> Name:
    """What `tensor` is. Raises AdapterError for a name that nothing would use."""
    pieces = tensor.split(".")
    for piece in pieces:
        if piece in UNSUPPORTED:
            raise AdapterError(f"tensor {show(tensor)} is not supported ({UNSUPPORTED[piece]})")
    markers = MARKERS | WRAPPERS | {TOKEN_MARKER}
    at = next((index for index, piece in enumerate(pieces) if piece in markers), None)
    if at is not None and pieces[at] == TOKEN_MARKER:
        part, names = _token_part(pieces[at:])
    elif at is None:
        if pieces[-1] not in OWN:
            raise AdapterError(f"tensor {show(tensor)} belongs to no format; nothing would use it")
        at, part, names = len(pieces) - 1, pieces[-1], []
    else:
        rest = pieces[at + 1 :]
        own = rest.pop() if rest and rest[-1] in OWN else ""
        names, part = rest, _part(pieces[at], own)
    if len(names) > 1 or not part:
        raise AdapterError(f"tensor {show(tensor)} belongs to no format; nothing would use it")
    module = find_module(".".join(pieces[:at]), catalogue)
    if module is None:
        raise AdapterError(f"tensor {show(tensor)}: the model has no module {show('.'.join(pieces[:at]))}")
    return Name(module, part, tensor.startswith(PREFIXES[0]), bool(names))


def find_module(written: str, catalogue: Catalogue) -> str | None:
    """The model's own name of a module as an adapter writes it."""
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
    """The modules of the model, or fused ones, that these tensors are about; names that say nothing are passed over."""
    written = set()
    for tensor in tensors:
        pieces = tensor.split(".")
        at = next((index for index, piece in enumerate(pieces) if piece in MARKERS), 0)
        written.add(".".join(pieces[:at]))
    found = {find_module(module, catalogue) for module in written}
    return {module for module in found if module is not None}


def show(name: str) -> str:
    """A name from a file, quoted and clipped, fit for one line."""
    return repr(name if len(name) <= 200 else name[:197] + "...")


def _token_part(pieces: list[str]) -> tuple[str, list[str]]:
    """Trained tokens' part, and an adapter's name behind it."""
    for part in (TOKENS, TOKENS_BASE):
        known = part.split(".")
        if pieces[: len(known)] == known:
            return part, pieces[len(known) :]
    return "", []


def _part(marker: str, own: str) -> str:
    """lora_A.weight, lora_E, bias; a magnitude is written with and without "weight"."""
    if marker in WRAPPERS:
        return f"{marker}.{own}" if own == "weight" else own
    return f"{marker}.{own}" if own and marker != "lora_magnitude_vector" else marker
