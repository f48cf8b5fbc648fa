"""Rank-stabilised LoRA (2312.03732): the scaling is alpha / sqrt(r)."""

from __future__ import annotations

import math
from typing import ClassVar

from model_runner.lora.variants.base import Variant


class RsLora(Variant, frozen=True, kw_only=True):
    """The option `use_rslora`."""

    features: ClassVar = {"rsLoRA": "`use_rslora`: the scaling is alpha / sqrt(r)"}
    label: ClassVar = "rank-stabilised"

    use_rslora: bool = False

    @property
    def is_on(self) -> bool:
        """Whether the option is set."""
        return self.use_rslora

    def scaling(self, alpha: float, rank: int) -> float:
        """Returns alpha / sqrt(rank)."""
        return alpha / math.sqrt(rank)
