"""RMSNorm (1910.07467) as a layer: holds a weight and the kind of norm; the ops compute the norm.

Where adapters have their own norm weights, each row is normed with the weight of its lane.
Legend: T tokens, H hidden size, N heads, D head size, L lanes including lane 0, the base.
"""

from __future__ import annotations

import torch

from model_runner.compute.ops.base import NormKind, Ops
from model_runner.config import ModelConfig
from model_runner.lora.pool.norms import NormPool
from model_runner.lora.site import NORMS, Site, Slice
from model_runner.model.layers.weights import Weights
from model_runner.quantization.plain import Plain
from model_runner.step.batch import Batch


class RMSNorm:
    """An RMSNorm layer: weight * x / sqrt(mean(x^2) + eps) over the last dimension."""

    def __init__(self, site: Site, eps: float, kind: NormKind, ops: Ops) -> None:
        self.site = site
        self.weight = site.base.dequantize()
        self.eps = eps
        self.kind = kind
        self._ops = ops
        self._table_LH: torch.Tensor | None = None

    def attach(self, norms: NormPool | None) -> None:
        """Sets the pool of the lanes' norm weights, or None if adapters may not have any."""
        self._table_LH = None if norms is None else norms.table(self.site)

    def __call__(self, x: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Returns the norm of `x`: [T, H] with a weight [H], or heads [T, N, D] with a weight [D]."""
        return self._ops.norm(x, self.weights(batch), self.eps, self.kind, batch.norm_lanes_T)

    def add(self, x_TH: torch.Tensor, added_TH: torch.Tensor | None, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns (the norm of x + added, x + added), computed in one operation; `added_TH` None adds nothing."""
        if added_TH is None:
            return self(x_TH, batch), x_TH
        return self._ops.add_norm(added_TH, x_TH, self.weights(batch), self.eps, self.kind, batch.norm_lanes_T)

    def weights(self, batch: Batch) -> torch.Tensor:
        """Returns the base's weight [H], or the weights of all lanes [L, H] where a row's adapter has its own."""
        if batch.norm_lanes_T is None:
            return self.weight
        assert self._table_LH is not None, "rows with norms of their own, and no table of them"
        return self._table_LH


def read_norm(config: ModelConfig, weights: Weights, module: str, size: int) -> RMSNorm:
    """Creates a norm of the model's kind, with the weight [size] of the checkpoint's `module`."""
    path, _, leaf = module.rpartition(".")
    inside = path.split(".")[1:3]
    layer = int(inside[1]) if inside[:1] == ["layers"] else -1
    weight = weights.tensor(f"{module}.weight", size)
    site = Site(module.removeprefix("model."), path, layer, NORMS, (Slice(leaf, 0, size),), Plain(weight))
    return RMSNorm(site, config.norm_eps, config.norm, weights.ops)
