"""Tokens to vectors and back: the embedding table and the head, which may be one tensor (tied).

Whole on every rank for now. Legend: T tokens, S rows that are asked for, H hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
from torch.nn.functional import embedding, linear


class Embedding:
    """A table [V, H], looked up by token."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight

    def __call__(self, tokens_T: torch.Tensor) -> torch.Tensor:
        """[T] -> [T, H]."""
        return embedding(tokens_T, self.weight)


class Head:
    """A linear [V, H] whose answers are float32 logits."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight

    def __call__(self, hidden_SH: torch.Tensor) -> torch.Tensor:
        """[S, H] -> [S, V] float32."""
        return linear(hidden_SH, self.weight).float()
