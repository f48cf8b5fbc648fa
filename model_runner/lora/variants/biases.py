"""Biases: those of the base that were trained (`bias`), and a separate bias of B (`lora_bias`).

bias = scaling * lora_B.bias + (trained bias - the base's bias)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import torch

from model_runner.lora.files.adapter_config import unsupported
from model_runner.lora.target_module import BaseSlices, Change, Module, Term
from model_runner.lora.variants.base import Variant

BIAS = "bias"
"""The trained bias of any module, targeted or not."""

LORA_BIAS = "lora_B.bias"


class Biases(Variant, frozen=True, kw_only=True):
    """The option `bias`: the base's biases were trained."""

    features: ClassVar = {"biases": '`lora_bias`, `bias="all"`, `bias="lora_only"`: a bias for every output column'}
    parts: ClassVar = frozenset({BIAS})
    becomes: ClassVar = frozenset[Term]({"bias"})

    bias: str = "none"

    @property
    def is_on(self) -> bool:
        """Whether there may be any bias."""
        return self.trains_base

    @property
    def trains_base(self) -> bool:
        """Whether the base's biases were trained."""
        return self.bias != "none"

    @property
    def whole_request_options(self) -> Sequence[str]:
        """`bias`, if it is set. `lora_bias` is not listed: B's bias is added only where B applies."""
        return [f'bias="{self.bias}"'] if self.trains_base else []

    def check(self) -> None:
        """Raises AdapterError unless `bias` is one of PEFT's three values."""
        if self.bias not in ("none", "all", "lora_only"):
            raise unsupported("bias", self.bias, "only none, all and lora_only")

    def apply(
        self, change: Change, module: Module, tensors: Mapping[str, torch.Tensor], base: BaseSlices, dtype: torch.dtype
    ) -> Change:
        """Sets the bias of the change: the sum of what the trained biases add to the base's output."""
        added = self._added(module, tensors, base)
        return replace(change, bias=torch.stack(added).sum(0)) if added else change

    def _added(self, module: Module, tensors: Mapping[str, torch.Tensor], base: BaseSlices) -> list[torch.Tensor]:
        """Returns the biases to sum, [O] each."""
        if BIAS not in tensors:
            return []
        return [tensors[BIAS] - torch.cat([part.bias().float().cpu() for part in base])]


class LoraBiases(Biases, frozen=True, kw_only=True):
    """The options `bias` and `lora_bias`. With `lora_bias`, B has a separate bias, which is scaled as B is."""

    parts: ClassVar = frozenset({BIAS, LORA_BIAS})

    lora_bias: bool = False

    @property
    def is_on(self) -> bool:
        """Whether there may be any bias."""
        return self.lora_bias or self.trains_base

    @property
    def required_parts(self) -> frozenset[str]:
        """The bias of B, if `lora_bias` is set."""
        return frozenset({LORA_BIAS}) if self.lora_bias else frozenset()

    def _added(self, module: Module, tensors: Mapping[str, torch.Tensor], base: BaseSlices) -> list[torch.Tensor]:
        """Returns the biases to sum, [O] each."""
        own = [tensors[LORA_BIAS] * module.target.scaling] if LORA_BIAS in tensors else []
        return own + super()._added(module, tensors, base)
