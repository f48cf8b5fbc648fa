"""Creates the layers' weights: uninitialised tensors on the device, and a list of the checkpoint tensors to copy in.

It does not read files: the checkpoint loader works off the list of placements. Tensor names are the checkpoint's.
"""

from __future__ import annotations

import torch

from model_runner.compute.ops import base as ops
from model_runner.platform.shard import Shard
from model_runner.quantization.base import LinearMethod
from model_runner.quantization.plain import Plain
from model_runner.weights.checkpoint import Placement


class Weights:
    """Allocates the uninitialised tensors of one model and holds their placements, their total size and the ops."""

    def __init__(
        self, device: torch.device, dtype: torch.dtype, shard: Shard, method: type[LinearMethod] = Plain
    ) -> None:
        self.device = device
        self.dtype = dtype
        self.shard = shard
        self.method = method
        self.ops = ops.create(device)
        self.placements: list[Placement] = []
        self.bytes = 0

    def empty(self, *shape: int) -> torch.Tensor:
        """Allocates an uninitialised tensor; `place` adds the placement that fills it."""
        tensor = torch.empty(shape, device=self.device, dtype=self.dtype)
        self.bytes += tensor.numel() * tensor.element_size()
        return tensor

    def linear(self, out_features: int, in_features: int, *, bias: bool = False) -> LinearMethod:
        """Creates a base linear of these sizes, stored by the model's method; the caller places its parameters."""
        return self.method.create(self.empty, out_features, in_features, bias=bias)

    def place(self, name: str, into: torch.Tensor, *, whole: int | None = None, dim: int = 0) -> None:
        """Adds a placement: tensor `name` fills `into`.

        With `whole`, the tensor has size `whole` in dimension `dim` in the file, and this rank's part is copied.
        """
        shape = list(into.shape)
        cut = [slice(None)] * into.dim()
        if whole is not None:
            shape[dim] = whole
            cut[dim] = self.shard.span(whole, f"size of {name}")
        self.placements.append(Placement(name, into, tuple(shape), tuple(cut)))

    def place_part(self, name: str, into: torch.Tensor, start: int, part: int, whole: int, *, dim: int = 0) -> None:
        """Adds a placement: this rank's share of a part of tensor `name` fills `into`.

        In dimension `dim`, the tensor has size `whole` in the file; the part begins at `start` and has size `part`.
        """
        span = self.shard.span(part, f"size of a part of {name}")
        shape = list(into.shape)
        shape[dim] = whole
        cut = [slice(None)] * into.dim()
        cut[dim] = slice(start + span.start, start + span.stop)
        self.placements.append(Placement(name, into, tuple(shape), tuple(cut)))

    def tensor(self, name: str, *shape: int) -> torch.Tensor:
        """Allocates and places a tensor that is not cut: every rank has all of it."""
        tensor = self.empty(*shape)
        self.place(name, tensor)
        return tensor
