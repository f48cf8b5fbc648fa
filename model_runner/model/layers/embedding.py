"""The embedding table and the head, which may share one tensor (tied). Adapters can change both.

Neither is cut by rank. Legend: T tokens, S rows whose logits are computed, H hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import embedding

from model_runner.lora.backends.base import LoraBackend
from model_runner.lora.pool.full_weights import (
    LaneIndices,
    mask_beyond_vocabulary,
    pad_vocabulary,
    replace_rows,
    vocabularies,
)
from model_runner.lora.site import EMBED, HEAD, Site, Slice
from model_runner.model.layers.weights import Weights
from model_runner.quantization.base import LinearMethod
from model_runner.quantization.plain import Plain


class Embedding:
    """The embedding table [V, H], looked up by token."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight
        self.site = Site("embed", "model", -1, EMBED, (Slice("embed_tokens", 0, weight.shape[1]),), Plain(weight))
        self.lora: LoraBackend | None = None

    def __call__(self, tokens_T: torch.Tensor, lora: Any = None, lanes_T: LaneIndices | None = None) -> torch.Tensor:
        """Looks up tokens: [T] -> [T, H]. `lora` is the backend's plan for these tokens; `lanes_T` as in Batch."""
        known_T = tokens_T
        if lanes_T is not None:  # tokens beyond the base's vocabulary are looked up in their lanes' tables
            known_T = tokens_T.clamp(max=self.site.vocabulary - 1)
        y_TH = embedding(known_T, self.weight)
        if self.lora is not None and lora is not None:
            self.lora.adapt(y_TH, known_T, self.site, lora)
        if self.lora is not None and lanes_T is not None:
            replace_rows(y_TH, tokens_T, self.site, self.lora.pages, lanes_T)
        return y_TH


class Head:
    """The head: a linear [V, H] whose outputs are float32 logits."""

    def __init__(self, base: LinearMethod, tied: bool = False) -> None:
        self.site = Site("head", "", -1, HEAD, (Slice("lm_head", 0, base.shape[0]),), base, tied=tied)
        self.lora: LoraBackend | None = None

    def __call__(self, hidden_SH: torch.Tensor, lora: Any = None, lanes_S: LaneIndices | None = None) -> torch.Tensor:
        """Computes logits: [S, H] -> [S, V] float32. `lora` is the backend's plan for the rows, `lanes_S` their lanes.

        V is the largest vocabulary of these rows; call `mask` to set the columns beyond a row's own vocabulary to -inf.
        """
        y_SV = self.site.base.apply(hidden_SH)
        if self.lora is not None and lora is not None:
            self.lora.adapt(y_SV, hidden_SH, self.site, lora)
        if self.lora is not None and lanes_S is not None:
            y_SV = pad_vocabulary(y_SV, vocabularies(self.site, self.lora.pages, lanes_S))
            replace_rows(y_SV, hidden_SH, self.site, self.lora.pages, lanes_S)
        return y_SV.float()

    def mask(self, logits_SV: torch.Tensor, lanes_S: LaneIndices) -> None:
        """Sets the columns beyond each row's own vocabulary to -inf, in place."""
        if self.lora is not None:
            mask_beyond_vocabulary(logits_SV, vocabularies(self.site, self.lora.pages, lanes_S))


def read_head(weights: Weights, vocabulary: int, hidden: int) -> Head:
    """Creates a head that is not tied: its weight is in the checkpoint."""
    base = weights.linear(vocabulary, hidden)
    for kind, parameter in base.parameters().items():
        weights.place(f"lm_head.{kind}", parameter.tensor)
    return Head(base)
