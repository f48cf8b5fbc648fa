"""The definition of a CPU kernel: a KernelKey names it, its KernelSpec has the C++ source and the torch reference.

Does not depend on compilers or processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec
import torch

Argument = torch.Tensor | int | float

TOLERANCE = {torch.bfloat16: 2**-7, torch.float32: 1e-5}
"""The dtypes that kernels exist for, and the error each allows, relative to the largest value of the reference."""


class Kernel(Protocol):
    """A function that takes tensors, ints and floats, and writes its results to some of the tensors.

    A call checks nothing: the number of arguments, their dtypes and contiguity must be those of the spec's arguments.
    """

    def __call__(self, *arguments: Argument) -> None: ...


class KernelKey(msgspec.Struct, frozen=True):
    """One kernel: its name in the registry's SPECS, and the dtype that it computes in."""

    name: str
    dtype: str = "bfloat16"

    def __str__(self) -> str:
        return f"{self.name} in {self.dtype}"


@dataclass(frozen=True)
class KernelSpec:
    """A kernel in C++ and in torch.

    source          exports `run`, which takes the address of each tensor, an int64 for an int, a float for a float;
                    for bfloat16 it is compiled with BFLOAT16 defined
    reference       the same computation in torch, which the compiled kernel is checked against; may be slow
    arguments       makes valid arguments with RandomTensors; all dimensions follow from one number, the size
    sizes           the sizes at which a kernel is checked
    """

    source: Path
    reference: Callable[..., None]
    arguments: Callable[[int], tuple[Argument, ...]]
    sizes: tuple[int, ...] = (1, 2, 7, 32)


def source(name: str) -> Path:
    """Returns the path of the C++ file called `name` in this folder."""
    return Path(__file__).with_name(name)


class RandomTensors:
    """Makes random tensors that are the same in every process, without using torch's global generator."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self._generator).to(self._dtype)


def compare(kernel: Kernel, spec: KernelSpec, most_sizes: int | None = None) -> str:
    """Returns a phrase that says how a kernel's results differ from the reference's; empty if they do not.

    Checks the first `most_sizes` sizes of the spec; None: all of them.
    """
    with torch.no_grad():
        faults = ((size, _compare_at(kernel, spec, size)) for size in spec.sizes[:most_sizes])
        return next((f"at size {size}: {words}" for size, words in faults if words), "")


def _compare_at(kernel: Kernel, spec: KernelSpec, size: int) -> str:
    expected, got = spec.arguments(size), spec.arguments(size)
    spec.reference(*expected)
    kernel(*got)
    for right, tensor in zip(_tensors(expected), _tensors(got), strict=True):
        largest = _largest(right.masked_fill(~right.isfinite(), 0))
        error = _largest((right.double() - tensor.double()).masked_fill(right == tensor, 0.0))
        if not error <= TOLERANCE.get(right.dtype, 0.0) * largest:
            return f"off by {error:.3g} where the largest is {largest:.3g}"
    return ""


def _tensors(arguments: Iterable[Argument]) -> list[torch.Tensor]:
    return [argument for argument in arguments if isinstance(argument, torch.Tensor)]


def _largest(tensor: torch.Tensor) -> float:
    return tensor.double().abs().max().item() if tensor.numel() else 0.0
