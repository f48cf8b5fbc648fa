"""The interface of base linears, y = x W^T + b: how the weight is stored and multiplied; and a table of formats.

    create            makes empty parameters; `parameters` says which tensors of the checkpoint fill them
    finish_loading    converts the filled parameters to the form that `apply` reads
    apply             computes y [T, O], with the bias added, from x [T, I]
    dequantize        returns rows of W as floats, for code that needs the base's values (DoRA, trained biases)

A format is one file with one class, and a line in METHODS. Does not depend on layers, files or adapters. Legend: T
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
"""A function that returns an uninitialised tensor of the given shape, on the model's device and in its dtype."""


@dataclass(frozen=True, eq=False)
class Parameter:
    """A tensor that the checkpoint fills.

    `out_dim` and `in_dim` are the tensor's dimensions over the out and the in features; None: it has no such dimension.
    """

    tensor: torch.Tensor
    out_dim: int | None = 0
    in_dim: int | None = None


class LinearMethod(ABC):
    """One base linear. `bias` [O] is None if the linear has no bias on this rank."""

    bias: torch.Tensor | None

    @classmethod
    def supports(cls, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether this format works for a model of `dtype` on `device` and is worth using there."""
        return True

    @classmethod
    @abstractmethod
    def create(cls, empty: Empty, out_features: int, in_features: int, *, bias: bool) -> LinearMethod:
        """Returns a linear whose parameters are not filled yet."""

    @abstractmethod
    def parameters(self) -> dict[str, Parameter]:
        """Returns the parameters that the checkpoint fills, by the part of the tensor's name after the module's name:
        weight, bias, ...
        """

    @abstractmethod
    def finish_loading(self) -> None:
        """Prepares the filled parameters for `apply`. Called once, after they are filled and before `apply`."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The weight's shape: [O, I]; for an embedding's table [vocabulary, O], for a norm's weight [O]."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """The device of the weight; meta if this process has only its shape."""

    @abstractmethod
    def apply(self, x_TI: torch.Tensor) -> torch.Tensor:
        """Returns y [T, O] for x [T, I]. It is a new tensor, because LoRA backends change it in place."""

    @abstractmethod
    def dequantize(self, rows: slice = ALL) -> torch.Tensor:
        """Returns these rows of the weight, [rows, I] in a float dtype: a view if it is stored in this form, else a
        copy.
        """


def find(name: str) -> type[LinearMethod]:
    """Returns the class that is called `name` in METHODS."""
    module, _, attribute = METHODS[name].partition(":")
    method: type[LinearMethod] = getattr(importlib.import_module(module), attribute)
    return method


def resolve(dtype: torch.dtype, device: torch.device) -> str:
    """Returns the name of the format for linears of a checkpoint that is not quantised: packed if that is worth
    using, else plain.
    """
    return "packed" if find("packed").supports(dtype, device) else "plain"
