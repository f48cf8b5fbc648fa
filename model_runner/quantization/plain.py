"""A linear with the checkpoint's weight unchanged, except for a cast to the model's dtype, multiplied by torch.

Also stores weights that are looked up (an embedding's table) or multiplied element by element (a norm's weight).
Legend: T tokens, I in features, O out features.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from model_runner.quantization.base import ALL, Empty, LinearMethod, Parameter


class Plain(LinearMethod):
    """A linear with one weight [O, I] in the model's dtype."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self.weight = weight
        self.bias = bias

    @classmethod
    def create(cls, empty: Empty, out_features: int, in_features: int, *, bias: bool) -> Plain:
        return cls(empty(out_features, in_features), empty(out_features) if bias else None)

    def parameters(self) -> dict[str, Parameter]:
        weight = {"weight": Parameter(self.weight, out_dim=0, in_dim=1)}
        return weight if self.bias is None else weight | {"bias": Parameter(self.bias)}

    def finish_loading(self) -> None:
        """Does nothing: the weight is used as it was loaded."""

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.weight.shape)

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def apply(self, x_TI: torch.Tensor) -> torch.Tensor:
        return functional.linear(x_TI, self.weight, self.bias)

    def dequantize(self, rows: slice = ALL) -> torch.Tensor:
        return self.weight[rows]
