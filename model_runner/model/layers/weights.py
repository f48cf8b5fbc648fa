"""Gives layers their weights: empty tensors on the device, and a list of placements for the checkpoint loader to fill.

Also holds the ops of the device. Knows nothing of files. Names are the checkpoint's.
"""

from __future__ import annotations

import torch

from model_runner.compute.ops import base as ops
from model_runner.platform.shard import Shard
from model_runner.quantization.base import LinearMethod
from model_runner.quantization.plain import Plain
from model_runner.weights.checkpoint import Placement


class Weights:
    """Allocates the tensors of one model, uninitialised, and keeps their placements and total size."""

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
        """An uninitialised tensor; `place` says what fills it."""
        tensor = torch.empty(shape, device=self.device, dtype=self.dtype)
        self.bytes += tensor.numel() * tensor.element_size()
        return tensor

    def linear(self, out_features: int, in_features: int, *, bias: bool = False) -> LinearMethod:
        """A base linear of these sizes on this rank, stored by the model's method; the caller places its parameters."""
        return self.method.create(self.empty, out_features, in_features, bias=bias)

    def place(self, name: str, into: torch.Tensor, *, whole: int | None = None, dim: int = 0) -> None:
        """Tensor `name` fills `into`; with `whole`, dimension `dim` is `whole` long in the file and cut by rank."""
        shape = list(into.shape)
        cut = [slice(None)] * into.dim()
        if whole is not None:
            shape[dim] = whole
            cut[dim] = self.shard.span(whole, f"size of {name}")
        self.placements.append(Placement(name, into, tuple(shape), tuple(cut)))

    def place_part(self, name: str, into: torch.Tensor, start: int, part: int, whole: int, *, dim: int = 0) -> None:
        """A part of tensor `name` fills `into`: in dimension `dim`, `whole` long in the file, `part` from `start` on,
        cut by rank.
        """
        span = self.shard.span(part, f"size of a part of {name}")
        shape = list(into.shape)
        shape[dim] = whole
        cut = [slice(None)] * into.dim()
        cut[dim] = slice(start + span.start, start + span.stop)
        self.placements.append(Placement(name, into, tuple(shape), tuple(cut)))

    def tensor(self, name: str, *shape: int) -> torch.Tensor:
        """A tensor that every rank has all of."""
        tensor = self.empty(*shape)
        self.place(name, tensor)
        return tensor
