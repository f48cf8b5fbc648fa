"""The PEFT formats by peft_type, and the union of what they declare. A format is imported at its first use."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from functools import cache

from model_runner.lora.formats.base import PeftFormat
from model_runner.lora.variants.base import Variant

FORMATS = {
    "LORA": "model_runner.lora.formats.lora:Lora",
    "ADALORA": "model_runner.lora.formats.adalora:AdaLora",
    "LOHA": "model_runner.lora.formats.loha:LoHa",
    "LOKR": "model_runner.lora.formats.lokr:LoKr",
}
"""The class of each format, by peft_type."""


def find_format(peft_type: str) -> type[PeftFormat]:
    """Returns the format of `peft_type`, which must be in FORMATS."""
    module, _, attribute = FORMATS[peft_type].partition(":")
    found: type[PeftFormat] = getattr(importlib.import_module(module), attribute)
    return found


@cache
def all_formats() -> tuple[type[PeftFormat], ...]:
    """Returns every format, in the order of FORMATS."""
    return tuple(find_format(peft_type) for peft_type in FORMATS)


@cache
def all_variants() -> tuple[type[Variant], ...]:
    """Returns every variant that some format can be combined with, in the order in which the formats name them."""
    return tuple(dict.fromkeys(variant for form in all_formats() for variant in form.variants))


@cache
def refused_options() -> Mapping[str, str]:
    """Returns the options that any format refuses, each with the usual name of its feature."""
    return {option: name for form in all_formats() for option, name in form.refused.items()}


@cache
def refused_parts() -> Mapping[str, str]:
    """Returns the components of tensor names that any format refuses, each with the usual name of its feature."""
    return {part: name for form in all_formats() for part, name in form.refused_parts.items()}


@cache
def all_features() -> Mapping[str, str]:
    """Returns the note of every feature that variants add to formats, by its name."""
    return {name: note for variant in all_variants() for name, note in variant.features.items()}


@cache
def known_parts() -> frozenset[str]:
    """Returns every part of a module that belongs to a format or a variant."""
    formats = [form.parts | form.unread_parts for form in all_formats()]
    return frozenset().union(*formats, *(variant.parts for variant in all_variants()))
