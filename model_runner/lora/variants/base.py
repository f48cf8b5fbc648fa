"""What a variant declares: the options and tensor parts that it adds to a format, and what they do to a module.

An instance holds the values of the variant's options, which are its fields, as one adapter has them. Does not depend
on tensor names and files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, ClassVar

import msgspec
import torch

from model_runner.lora.target_module import BaseSlices, Change, Module, Term

Blocks = Callable[[], Iterator[tuple[slice, torch.Tensor]]]
"""Yields a matrix in float32, a block of rows at a time. Each call computes the blocks anew: they may be changed."""


class Variant(msgspec.Struct, frozen=True, kw_only=True):
    """One variant. Its fields are options of adapter_config.json with PEFT's defaults, all of them off by default."""

    features: ClassVar[Mapping[str, str]] = {}
    """Notes by the usual name of each feature, for the documentation; a note says what the feature becomes."""

    label: ClassVar[str] = ""
    """The word before the format's name when the variant is on, such as "activated" in "activated LoRA"."""

    format_name: ClassVar[str] = ""
    """The name that replaces the format's name when the variant is on, such as "DoRA"."""

    parts: ClassVar[frozenset[str]] = frozenset()
    """The tensor parts of a module that belong to the variant. Files may spell a part in other ways: `spellings`."""

    spellings: ClassVar[Mapping[str, str]] = {}
    """Other spellings of the variant's parts, each with the part that it refers to."""

    becomes: ClassVar[frozenset[Term]] = frozenset()
    """The terms of the normal form that the variant's parts become."""

    revision_name: ClassVar[str] = ""
    """The name that the variant adds to the format's name in an adapter's revision."""

    @property
    def is_on(self) -> bool:
        """Whether the options switch the variant on."""
        raise NotImplementedError

    @property
    def required_parts(self) -> frozenset[str]:
        """The parts, [O] each, that every targeted module must have when the variant is on."""
        return frozenset()

    @property
    def whole_request_options(self) -> Sequence[str]:
        """The options in use that act on the whole request; an activated LoRA is refused with them."""
        return ()

    def check(self) -> None:
        """Raises AdapterError for values of its options that are not served."""

    def check_vocabulary(self, vocabulary: int) -> None:
        """Raises AdapterError for options that do not fit a model with a vocabulary of `vocabulary` tokens."""

    def check_beside(self, others: Sequence[Variant]) -> None:
        """Raises AdapterError if the variant is not served together with one of `others`, which are on too."""

    def check_module(self, module: Module, becomes: AbstractSet[Term]) -> None:
        """Raises AdapterError if a change of the module to the terms `becomes` is not served with the variant."""

    def scaling(self, alpha: float, rank: int) -> float | None:
        """Returns the factor that B A is multiplied with, or None if the variant does not decide it."""
        return None

    def revision(self) -> list[Any]:
        """Returns the options, for the revision, that change the delta and are not visible in the tensors."""
        return []

    def apply(
        self, change: Change, module: Module, tensors: Mapping[str, torch.Tensor], base: BaseSlices, dtype: torch.dtype
    ) -> Change:
        """Returns the change with the variant applied. `tensors`: float32 by part; `dtype`: the serving dtype."""
        return change

    def scale_merged(self, blocks: Blocks, tensors: Mapping[str, torch.Tensor], *, embeds: bool) -> Blocks:
        """Applies the variant to a full matrix [V, H] with the delta merged in; `embeds`: it is the embedding's."""
        return blocks
