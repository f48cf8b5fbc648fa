"""Linears as sites: one fused weight of one or more checkpoint modules, cut by rank, with LoRA attached from outside.

    column  y = [x Wq^T | x Wk^T | x Wv^T]   each rank holds some outputs of every slice
    row     y = all_reduce(x W^T)            each rank holds some inputs; the sum comes after the LoRA delta

Legend: T tokens, I in features, O out features of this rank.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from model_runner.lora.backends.base import LoraBackend
from model_runner.lora.site import Site, Slice
from model_runner.model.layers.weights import Weights
from model_runner.platform.shard import Shard
from model_runner.step.batch import Batch
from model_runner.weights.packed import linear, pack


class Linear:
    """A site and, once attached, the LoRA backend that computes it."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.lora: LoraBackend | None = None

    def pack(self) -> None:
        """Its weight in the order in which a CPU reads it; the plain one is given up."""
        self.site = replace(self.site, weight=pack(self.site.weight))

    def __call__(self, x_TI: torch.Tensor, batch: Batch) -> torch.Tensor:
        """[T, I] -> [T, O]."""
        if self.lora is None:
            return linear(x_TI, self.site.weight, self.site.bias)
        return self.lora.linear(x_TI, self.site, batch.lora)


class RowLinear(Linear):
    """A linear whose inputs are spread over the ranks: one reduce, after base and delta."""

    def __init__(self, site: Site, shard: Shard) -> None:
        super().__init__(site)
        self.shard = shard

    def __call__(self, x_TI: torch.Tensor, batch: Batch) -> torch.Tensor:
        return self.shard.all_reduce(super().__call__(x_TI, batch))


def column_linear(
    weights: Weights,
    name: str,
    path: str,
    layer: int,
    group: str,
    outs: dict[str, int],
    inputs: int,
    *,
    bias: bool,
    fused: str | None = None,
) -> Linear:
    """The modules of `outs` (checkpoint name -> out features over all ranks) side by side in one weight.

    `fused`: the checkpoint holds them so under this one name. Then the site has one slice, for so has an adapter: one
    A for all of it.
    """
    slices: list[Slice] = []
    for module, out in outs.items():
        start = slices[-1].stop if slices else 0
        slices.append(Slice(module, start, start + weights.shard.share(out, f"{module} outputs")))
    width = slices[-1].stop
    tensors = {"weight": weights.empty(width, inputs)} | ({"bias": weights.empty(width)} if bias else {})
    for kind, tensor in tensors.items():
        begin = 0
        for part, whole in zip(slices, outs.values(), strict=True):
            into = tensor[part.start : part.stop]
            if fused is None:
                weights.place(f"{path}.{part.module}.{kind}", into, whole=whole)
            else:
                weights.place_part(f"{path}.{fused}.{kind}", into, begin, whole, sum(outs.values()))
            begin += whole
    cut = tuple(slices) if fused is None else (Slice(fused, 0, width),)
    return Linear(Site(name, path, layer, group, cut, tensors["weight"], tensors.get("bias")))


def row_linear(
    weights: Weights, name: str, path: str, layer: int, group: str, module: str, inputs: int, out: int, *, bias: bool
) -> RowLinear:
    """One module whose `inputs` (over all ranks) are cut by rank. The bias is rank 0's, so that it is added once."""
    weight = weights.empty(out, weights.shard.share(inputs, f"{module} inputs"))
    weights.place(f"{path}.{module}.weight", weight, whole=inputs, dim=1)
    offset = weights.tensor(f"{path}.{module}.bias", out) if bias else None
    site = Site(name, path, layer, group, (Slice(module, 0, out),), weight, offset if weights.shard.rank == 0 else None)
    return RowLinear(site, weights.shard)
