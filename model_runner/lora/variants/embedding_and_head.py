"""`ensure_weight_tying`: the embedding and the head, which may share one weight, are targeted together."""

from __future__ import annotations

from typing import ClassVar

from model_runner.lora.variants.base import Variant


class EmbeddingAndHead(Variant, frozen=True, kw_only=True):
    """The option `ensure_weight_tying`: if the embedding or head is targeted, so is the other if it has tensors."""

    features: ClassVar = {"embedding and head": "`embed_tokens` and `lm_head` among the targets, tied or not"}

    ensure_weight_tying: bool = False

    @property
    def is_on(self) -> bool:
        """Whether both are targeted when one is."""
        return self.ensure_weight_tying
