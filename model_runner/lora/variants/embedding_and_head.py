"""The embedding and the head among the targets, which may be one weight: `ensure_weight_tying`."""

from __future__ import annotations

from typing import ClassVar

from model_runner.lora.variants.base import Variant


class EmbeddingAndHead(Variant, frozen=True, kw_only=True):
    """`ensure_weight_tying`: if the embedding or the head is targeted, so is the other if it has tensors."""

    features: ClassVar = {"embedding and head": "`embed_tokens` and `lm_head` among the targets, tied or not"}

    ensure_weight_tying: bool = False

    @property
    def is_on(self) -> bool:
        """Whether both are targeted when one is."""
        return self.ensure_weight_tying
