"""The gated MLP: down(silu(gate(x)) * up(x)), gate and up fused. Legend: T tokens, H hidden size."""

from __future__ import annotations

import torch
from torch.nn.functional import silu

from model_runner.arch import Arch
from model_runner.batch import Batch
from model_runner.layers.linear import column_linear, row_linear
from model_runner.layers.weights import Weights


class MLP:
    """One layer's MLP."""

    def __init__(self, arch: Arch, layer: int, weights: Weights) -> None:
        path, inner, hidden = f"model.layers.{layer}.mlp", arch.intermediate_size, arch.hidden_size
        outs = {"gate_proj": inner, "up_proj": inner}
        self.gate_up = column_linear(
            weights, f"layers.{layer}.gate_up", path, layer, "gate_up", outs, hidden, bias=arch.mlp_bias
        )
        self.down = row_linear(
            weights, f"layers.{layer}.down", path, layer, "down", "down_proj", inner, hidden, bias=arch.mlp_bias
        )

    def __call__(self, x_TH: torch.Tensor, batch: Batch) -> torch.Tensor:
        """[T, H] -> [T, H]."""
        gate, up = self.gate_up(x_TH, batch).chunk(2, dim=-1)
        return self.down(silu(gate) * up, batch)
