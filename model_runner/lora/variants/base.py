"""What a variant declares: the options and tensor parts that it adds to a format, and what they do to a module.

An instance holds the values of the variant's options, which are its fields, as one adapter has them. Knows nothing of
tensor names and files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, ClassVar

import msgspec
import torch

from model_runner.lora.target_module import BaseSlices, Change, Module, Term

Blocks = Callable[[], Iterator[tuple[slice, torch.Tensor]]]
"""A matrix in float32, a block of rows at a time, computed anew by each call; blocks may be changed in place."""


class Variant(msgspec.Struct, frozen=True, kw_only=True):
    """One variant. Its fields are options of adapter_config.json with PEFT's defaults, all of them off by default."""

    features: ClassVar[Mapping[str, str]] = {}
    """Name and note of each feature that people know, for tables; the note says what it becomes."""

    label: ClassVar[str] = ""
    """Stands before the format's name when the variant is on: "activated LoRA"."""

    format_name: ClassVar[str] = ""
    """Stands instead of the format's name when the variant is on: "DoRA"."""

    parts: ClassVar[frozenset[str]] = frozenset()
    """Every part of a module that belongs to it. They may have other spellings."""

    spellings: ClassVar[Mapping[str, str]] = {}
    """Other spellings of its parts."""

    becomes: ClassVar[frozenset[Term]] = frozenset()
    """The terms of the normal form that its parts become."""

    revision_name: ClassVar[str] = ""
    """What it adds to the name of the format in an adapter's revision."""

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
        """The options in use whose effect cannot begin at a token; an activated LoRA is refused with them."""
        return ()

    def check(self) -> None:
        """Raises AdapterError for values of its options that are not served."""

    def check_vocabulary(self, vocabulary: int) -> None:
        """Raises AdapterError for options that do not fit a model of so many tokens."""

    def check_beside(self, others: Sequence[Variant]) -> None:
        """Raises AdapterError where it is not served together with one of the other variants that are on."""

    def check_module(self, module: Module, becomes: AbstractSet[Term]) -> None:
        """Raises AdapterError where such a change of the module is not served together with the variant."""

    def scaling(self, alpha: float, rank: int) -> float | None:
        """What B A is multiplied with, where the variant decides it."""
        return None

    def revision(self) -> list[Any]:
        """The options that change the delta and cannot be told from the tensors: part of the adapter's revision."""
        return []

    def apply(
        self, change: Change, module: Module, tensors: Mapping[str, torch.Tensor], base: BaseSlices, dtype: torch.dtype
    ) -> Change:
        """The change with the variant's parts in it; `tensors` are float32 by part, `dtype` is the serving dtype."""
        return change

    def scale_merged(self, blocks: Blocks, tensors: Mapping[str, torch.Tensor], *, embeds: bool) -> Blocks:
        """The same for a full matrix [V, H] that the delta was merged into; `embeds`: it is the embedding."""
        return blocks
