"""Linears that adapters can change: a base linear of one or more checkpoint modules, cut by rank, and its LoRA.

    column  y = [x Wq^T | x Wk^T | x Wv^T]   each rank has some out features of every slice
    row     y = all_reduce(x W^T)            each rank has some in features; the LoRA delta is added before the sum

Legend: T tokens, I in features, O out features of this rank.
"""

from __future__ import annotations

import torch

from model_runner.lora.backends.base import LoraBackend
from model_runner.lora.site import Site, Slice
from model_runner.model.layers.weights import Weights
from model_runner.platform.shard import Shard
from model_runner.quantization.base import Parameter
from model_runner.step.batch import Batch


class Linear:
    """A site with its base linear and, once attached, the LoRA backend that adds the deltas to the linear's output."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.lora: LoraBackend | None = None

    def __call__(self, x_TI: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Returns the output of the base linear with the LoRA deltas: [T, I] -> [T, O]."""
        y_TO = self.site.base.apply(x_TI)
        if self.lora is not None and batch.lora is not None:
            self.lora.adapt(y_TO, x_TI, self.site, batch.lora)
        return y_TO


class RowLinear(Linear):
    """A linear whose in features are spread over the ranks: one all-reduce, after base output and LoRA delta."""

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
    """Creates one base linear of the modules of `outs` (checkpoint name -> out features over all ranks), side by side.

    `fused`: the name of the one module under which the checkpoint holds all of `outs`. The site then has one slice,
    because an adapter has one A for the whole module.
    """
    slices: list[Slice] = []
    for module, out in outs.items():
        start = slices[-1].stop if slices else 0
        slices.append(Slice(module, start, start + weights.shard.share(out, f"{module} outputs")))
    base = weights.linear(slices[-1].stop, inputs, bias=bias)
    for kind, parameter in base.parameters().items():
        _place_columns(weights, path, kind, parameter, slices, list(outs.values()), fused)
    cut = tuple(slices) if fused is None else (Slice(fused, 0, slices[-1].stop),)
    return Linear(Site(name, path, layer, group, cut, base))


def row_linear(
    weights: Weights, name: str, path: str, layer: int, group: str, module: str, inputs: int, out: int, *, bias: bool
) -> RowLinear:
    """Creates the linear of one module, its `inputs` in features (over all ranks) cut by rank.

    Only rank 0 has the bias, so that the sum contains it once.
    """
    base = weights.linear(out, weights.shard.share(inputs, f"{module} inputs"), bias=bias)
    for kind, parameter in base.parameters().items():
        whole = None if parameter.in_dim is None else inputs
        weights.place(f"{path}.{module}.{kind}", parameter.tensor, whole=whole, dim=parameter.in_dim or 0)
    if weights.shard.rank != 0:
        base.bias = None
    return RowLinear(Site(name, path, layer, group, (Slice(module, 0, out),), base), weights.shard)


def _place_columns(
    weights: Weights,
    path: str,
    kind: str,
    parameter: Parameter,
    slices: list[Slice],
    out_sizes: list[int],
    fused: str | None,
) -> None:
    """Places each module's tensor, or its part of the fused one, into its slice of the parameter. `out_sizes` are the
    out features of the modules over all ranks.
    """
    assert parameter.out_dim is not None, f"{kind} cannot be cut by out features"
    begin, dim = 0, parameter.out_dim
    for piece, whole in zip(slices, out_sizes, strict=True):
        into = parameter.tensor.narrow(dim, piece.start, piece.width)
        if fused is None:
            weights.place(f"{path}.{piece.module}.{kind}", into, whole=whole, dim=dim)
        else:
            weights.place_part(f"{path}.{fused}.{kind}", into, begin, whole, sum(out_sizes), dim=dim)
        begin += whole
