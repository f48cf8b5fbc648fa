"""The gated MLP: down(act(gate(x)) * up(x)), gate and up fused. Legend: T tokens, H hidden size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Protocol

import torch
from torch.nn.functional import gelu, silu

from model_runner.arch import Arch
from model_runner.batch import Batch
from model_runner.layers.linear import Linear, column_linear, row_linear
from model_runner.layers.weights import Weights

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": silu,
    "gelu_tanh": partial(gelu, approximate="tanh"),
}


class FeedForward(Protocol):
    """What stands after attention in a layer."""

    def linears(self) -> Iterator[Linear]:
        """Its sites."""

    def __call__(self, x_TH: torch.Tensor, batch: Batch) -> torch.Tensor:
        """[T, H] -> [T, H]."""


class MLP:
    """One layer's MLP."""

    def __init__(self, arch: Arch, layer: int, weights: Weights) -> None:
        path, inner, hidden = f"model.layers.{layer}.mlp", arch.intermediate_size, arch.hidden_size
        self.activation = ACTIVATIONS[arch.activation]
        self.gate_up = column_linear(
            weights,
            f"layers.{layer}.gate_up",
            path,
            layer,
            "gate_up",
            {"gate_proj": inner, "up_proj": inner},
            hidden,
            bias=arch.mlp_bias,
            fused="gate_up_proj" if arch.fused else None,
        )
        self.down = row_linear(
            weights, f"layers.{layer}.down", path, layer, "down", "down_proj", inner, hidden, bias=arch.mlp_bias
        )

    def linears(self) -> Iterator[Linear]:
        """Its two sites."""
        yield from (self.gate_up, self.down)

    def __call__(self, x_TH: torch.Tensor, batch: Batch) -> torch.Tensor:
        """[T, H] -> [T, H]."""
        gate, up = self.gate_up(x_TH, batch).chunk(2, dim=-1)
        return self.down(self.activation(gate) * up, batch)
