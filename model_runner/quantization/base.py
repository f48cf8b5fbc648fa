"""The seam of base linears, y = x W^T + b: how one is stored and multiplied, and a lazy table of names.

    create            empty parameters; `parameters` says which tensors of the checkpoint fill them
    finish_loading    the filled parameters become what `apply` reads
    apply             x [T, I] -> y [T, O], the bias added
    dequantize        rows of W as floats, for what depends on the base's values (DoRA, trained biases)

A format is one file with one class, and a line in METHODS. Knows nothing of layers, files and adapters. Legend: T
tokens, I in features, O out features of this rank.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch

METHODS = {
    "plain": "model_runner.quantization.plain:Plain",
    "packed": "model_runner.quantization.packed:Packed",
}

ALL = slice(None)

Empty = Callable[..., torch.Tensor]
"""Makes an uninitialised tensor of a shape, on the model's device and in its dtype."""


@dataclass(frozen=True, eq=False)
class Parameter:
    """A tensor that the checkpoint fills. `out_dim` and `in_dim` are its dimensions over the out and the in features;
    None: it has no such dimension.
    """

    tensor: torch.Tensor
    out_dim: int | None = 0
    in_dim: int | None = None


class LinearMethod(ABC):
    """One base linear. `bias` [O] is None where the linear has none on this rank."""

    bias: torch.Tensor | None

    @classmethod
    def supports(cls, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether a model of this dtype can be served so on the device, and gains by it."""
        return True

    @classmethod
    @abstractmethod
    def create(cls, empty: Empty, out_features: int, in_features: int, *, bias: bool) -> LinearMethod:
        """A linear whose parameters are not yet filled."""

    @abstractmethod
    def parameters(self) -> dict[str, Parameter]:
        """What the checkpoint fills, by the tensor's name behind the module's: weight, bias, ..."""

    @abstractmethod
    def finish_loading(self) -> None:
        """Called once, when the parameters are filled and before `apply`."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """[O, I]. Of an embedding's table [vocabulary, O], of a norm's weight [O]."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the values are; meta: this process has only the shape."""

    @abstractmethod
    def apply(self, x_TI: torch.Tensor) -> torch.Tensor:
        """[T, I] -> [T, O], a new tensor: LoRA backends change it in place."""

    @abstractmethod
    def dequantize(self, rows: slice = ALL) -> torch.Tensor:
        """These rows of the weight, [rows, I] in a float dtype: a view where it is stored so, else a copy."""


def find(name: str) -> type[LinearMethod]:
    """The class called `name` in METHODS."""
    module, _, attribute = METHODS[name].partition(":")
    method: type[LinearMethod] = getattr(importlib.import_module(module), attribute)
    return method


def resolve(dtype: torch.dtype, device: torch.device) -> str:
    """How the linears of a model whose checkpoint is not quantised are stored: packed where that gains."""
    return "packed" if find("packed").supports(dtype, device) else "plain"
