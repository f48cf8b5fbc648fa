"""Tokens to vectors and back: the embedding table and the head, which may be one tensor (tied). Both are sites.

Whole on every rank for now. Legend: T tokens, S rows that are asked for, H hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import embedding, linear

from model_runner.lora.base import LoraBackend
from model_runner.lora.site import EMBED, HEAD, Site, Slice
from model_runner.lora.wholes import replace_rows

Lanes = NDArray[np.int32]


class Embedding:
    """A table [V, H], looked up by token."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight
        self.site = Site("embed", "model", -1, EMBED, (Slice("embed_tokens", 0, weight.shape[1]),), weight)
        self.lora: LoraBackend | None = None

    def __call__(self, tokens_T: torch.Tensor, lora: Any = None, lanes_T: Lanes | None = None) -> torch.Tensor:
        """[T] -> [T, H]; `lora` is what the backend planned for these tokens, `lanes_T` as in the batch."""
        if self.lora is None:
            return embedding(tokens_T, self.weight)
        y_TH = self.lora.embed(tokens_T, self.site, lora)
        if lanes_T is not None:
            replace_rows(y_TH, tokens_T, self.site, self.lora.pages, lanes_T, lambda table, x: embedding(x, table))
        return y_TH


class Head:
    """A linear [V, H] whose answers are float32 logits."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight
        self.site = Site("head", "", -1, HEAD, (Slice("lm_head", 0, weight.shape[0]),), weight)
        self.lora: LoraBackend | None = None

    def __call__(self, hidden_SH: torch.Tensor, lora: Any = None, lanes_S: Lanes | None = None) -> torch.Tensor:
        """[S, H] -> [S, V] float32; `lora` is what the backend planned for these rows, `lanes_S` their lanes."""
        if self.lora is None:
            return linear(hidden_SH, self.weight).float()
        y_SV = self.lora.linear(hidden_SH, self.site, lora)
        if lanes_S is not None:
            replace_rows(y_SV, hidden_SH, self.site, self.lora.pages, lanes_S, lambda head, x: linear(x, head))
        return y_SV.float()
