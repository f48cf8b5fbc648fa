"""RMSNorm (1910.07467) as a layer: a weight and the model's kind of norm. The ops compute it.

Where adapters bring norm weights, each row has the weight of its lane.
Legend: T tokens, H hidden size, L lanes and the base.
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
    """weight * x / sqrt(mean(x^2) + eps) over the last dimension."""

    def __init__(self, site: Site, eps: float, kind: NormKind, ops: Ops) -> None:
        self.site = site
        self.weight = site.base.dequantize()
        self.eps = eps
        self.kind = kind
        self._ops = ops
        self._table_LH: torch.Tensor | None = None

    def attach(self, norms: NormPool | None) -> None:
        """Sets the pool of the lanes' norm weights, if adapters may bring any."""
        self._table_LH = None if norms is None else norms.table(self.site)

    def __call__(self, x: torch.Tensor, batch: Batch) -> torch.Tensor:
        """[T, H], or heads [T, N, D] with a weight [D]."""
        return self._ops.norm(x, self.weights(batch), self.eps, self.kind, batch.norm_lanes_T)

    def add(self, x_TH: torch.Tensor, added_TH: torch.Tensor | None, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """(the norm of x + added, x + added) in one operation; None adds nothing."""
        if added_TH is None:
            return self(x_TH, batch), x_TH
        return self._ops.add_norm(added_TH, x_TH, self.weights(batch), self.eps, self.kind, batch.norm_lanes_T)

    def weights(self, batch: Batch) -> torch.Tensor:
        """The weight [H], or, where a row of the step has one of its own, those of all lanes [L, H]."""
        if batch.norm_lanes_T is None:
            return self.weight
        assert self._table_LH is not None, "rows with norms of their own, and no table of them"
        return self._table_LH


def read_norm(config: ModelConfig, weights: Weights, module: str, size: int) -> RMSNorm:
    """The model's kind of norm, its weight [size] from the checkpoint's `module`."""
    path, _, leaf = module.rpartition(".")
    inside = path.split(".")[1:3]
    layer = int(inside[1]) if inside[:1] == ["layers"] else -1
    weight = weights.tensor(f"{module}.weight", size)
    site = Site(module.removeprefix("model."), path, layer, NORMS, (Slice(leaf, 0, size),), Plain(weight))
    return RMSNorm(site, config.norm_eps, config.norm, weights.ops)
