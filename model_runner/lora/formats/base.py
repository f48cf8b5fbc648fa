"""What a PEFT format declares: its options, its variants, the tensor parts of a module, and what they become.

An instance holds the values of the format's own options, which are its fields, as one adapter has them. Does not depend
on files, module names and pages. Legend: I in features, O out features of the module, r its rank in the config, R its
rank in the normal form.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import msgspec
import torch

from engine.errors import AdapterError
from model_runner.lora.files.adapter_config import CONFIG_NAME
from model_runner.lora.files.quoted import quoted_value
from model_runner.lora.normal_form import MAX_RANK
from model_runner.lora.target_module import Change, Module, Shape, Term
from model_runner.lora.variants.base import Variant

RankPattern = Mapping[str, int | list[bool]]
"""The option rank_pattern of any format: ranks, or AdaLoRA's lists of kept values."""


class PeftFormat(msgspec.Struct, frozen=True, kw_only=True):
    """One format. Its fields are options of adapter_config.json with PEFT's defaults; all of them change the output."""

    peft_type: ClassVar[str]
    name: ClassVar[str]

    note: ClassVar[str]
    """What the format becomes in the normal form, for the tables of the documentation."""

    becomes: ClassVar[frozenset[Term]]
    """The terms of the normal form that the format's parts become."""

    parts: ClassVar[frozenset[str]]
    """The tensor parts of a module that the format may read."""

    unread_parts: ClassVar[frozenset[str]] = frozenset()
    """Parts that PEFT writes for layers which a decoder does not have."""

    refused_parts: ClassVar[Mapping[str, str]] = {}
    """Components of tensor names that belong to a feature which is not served, with the feature's name."""

    variants: ClassVar[tuple[type[Variant], ...]] = ()
    """The variants that the format can be combined with."""

    harmless: ClassVar[frozenset[str]] = frozenset()
    """Options about training or initialisation. Their effect follows from other options or from the tensors."""

    refused: ClassVar[Mapping[str, str]] = {}
    """Options that change what an adapter computes and are not served, with the feature's usual name."""

    highest_rank: ClassVar[int] = MAX_RANK
    """The highest rank that the config may name."""

    rank_option: ClassVar[str] = "r"
    alpha_option: ClassVar[str] = "alpha"
    """The names of the options that hold rank and alpha; "" if the format has none and defines its own scaling."""

    @classmethod
    def used_options(cls) -> frozenset[str]:
        """Returns the format's own options and those of its variants."""
        owners = (cls, *cls.variants)
        return frozenset(option for owner in owners for option in owner.__struct_fields__)

    @property
    def default_rank(self) -> int:
        """The rank of modules that rank_pattern does not name."""
        rank: int = getattr(self, self.rank_option) if self.rank_option else 0
        return rank

    @property
    def default_alpha(self) -> float:
        """The alpha of modules that alpha_pattern does not name."""
        alpha: float = getattr(self, self.alpha_option) if self.alpha_option else 1
        return alpha

    def check(self) -> None:
        """Raises AdapterError for values of its options that are not served."""

    def scaling(self, alpha: float, rank: int) -> float:
        """Returns the factor that the weight's change is multiplied with, unless a variant decides it."""
        return alpha / rank

    def pattern_ranks(self, pattern: RankPattern) -> Mapping[str, int]:
        """Returns the ranks in rank_pattern, by regular expression. Raises AdapterError for anything else in it."""
        ranks: dict[str, int] = {}
        for key, rank in pattern.items():
            if not isinstance(rank, int):
                raise wrong_pattern(key, rank)
            ranks[key] = rank
        return ranks

    def final_ranks(self, pattern: RankPattern) -> Mapping[str, int]:
        """Returns the ranks of the modules, by full name, whose rank became smaller in training."""
        return {}

    def revision(self) -> list[Any]:
        """Returns the options, beside rank and alpha, that change the delta and are not visible in the tensors."""
        return []

    def shapes(self, module: Module, found: Mapping[str, Shape]) -> dict[str, Shape]:
        """Returns the shapes of the parts that the module must have. Those it has, `found`, may select a form."""
        raise NotImplementedError

    def rank(self, module: Module, found: Mapping[str, Shape]) -> int:
        """Returns R, or 0 for a format that becomes neither A nor B."""
        raise NotImplementedError

    def change(self, module: Module, tensors: Mapping[str, torch.Tensor]) -> Change:
        """Returns the scaled change to the module, B^T A for its weight, from float32 tensors by part."""
        raise NotImplementedError


def wrong_pattern(key: str, rank: object) -> AdapterError:
    """Returns the error for a value in rank_pattern that belongs to another format."""
    return AdapterError(f"{CONFIG_NAME}: rank_pattern[{key!r}]={quoted_value(rank)} is not of this peft_type")
