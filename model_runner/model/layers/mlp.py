"""The gated MLP: down(act(gate(x)) * up(x)), with gate and up fused. Legend: T tokens, H hidden size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch

from model_runner.compute.ops.base import Ops
from model_runner.config import ModelConfig
from model_runner.model.layers.linear import Linear, column_linear, row_linear
from model_runner.model.layers.weights import Weights
from model_runner.step.batch import Batch


def gated_activation(ops: Ops, activation: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """Returns the operation act(gate) * up, whose input is gate and up side by side in the last dimension."""
    return {"silu": ops.silu_mul, "gelu_tanh": ops.gelu_tanh_mul}[activation]


class FeedForward(Protocol):
    """The part of a layer after attention: an MLP or experts."""

    def linears(self) -> Iterator[Linear]:
        """Yields the linears."""

    def __call__(self, x_TH: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Computes the output: [T, H] -> [T, H]."""


class MLP:
    """One layer's gated MLP."""

    def __init__(self, config: ModelConfig, layer: int, weights: Weights) -> None:
        path, inner, hidden = f"model.layers.{layer}.mlp", config.intermediate_size, config.hidden_size
        self.gate = gated_activation(weights.ops, config.activation)
        self.gate_up = column_linear(
            weights,
            f"layers.{layer}.gate_up",
            path,
            layer,
            "gate_up",
            {"gate_proj": inner, "up_proj": inner},
            hidden,
            bias=config.mlp_bias,
            fused="gate_up_proj" if config.fused else None,
        )
        self.down = row_linear(
            weights, f"layers.{layer}.down", path, layer, "down", "down_proj", inner, hidden, bias=config.mlp_bias
        )

    def linears(self) -> Iterator[Linear]:
        """Yields gate_up and down."""
        yield from (self.gate_up, self.down)

    def __call__(self, x_TH: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Computes the output: [T, H] -> [T, H]."""
        return self.down(self.gate(self.gate_up(x_TH, batch)), batch)
