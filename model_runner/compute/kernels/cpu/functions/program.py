"""What is compiled: a Function names it, its Program is C++ and what that is held against.

Knows nothing of compilers, files and processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec
import torch

Argument = torch.Tensor | int | float

ROUNDING = {torch.bfloat16: 2**-7, torch.float32: 1e-5}
"""Of the dtypes that functions are written for."""


class Kernel(Protocol):
    """Takes tensors, ints and floats, and writes its results to some of the tensors. Nothing is checked at a call:
    how many they are, their dtypes and contiguity must be those of the program's arguments.
    """

    def __call__(self, *arguments: Argument) -> None: ...


class Function(msgspec.Struct, frozen=True):
    """One function, by its name in FUNCTIONS and the dtype that it computes in."""

    name: str
    dtype: str = "bfloat16"

    def __str__(self) -> str:
        return f"{self.name} in {self.dtype}"


@dataclass(frozen=True)
class Program:
    """A function in C++ and in torch.

    source          exports `run`, which takes the address of each tensor, an int64 for an int, a float for a float;
                    for bfloat16 it is compiled with BFLOAT16
    reference       computes the same: what the source is held against, however slow
    arguments       valid ones for a size, drawn by `Draw`: all their dimensions follow from that one number
    sizes           those it is tried on
    """

    source: Path
    reference: Callable[..., None]
    arguments: Callable[[int], tuple[Argument, ...]]
    sizes: tuple[int, ...] = (1, 2, 7, 32)


def source(name: str) -> Path:
    """The file of this name beside this one."""
    return Path(__file__).with_name(name)


class Draw:
    """Random tensors that are the same in every process, and leave torch's own generator alone."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self._generator).to(self._dtype)


def differs(kernel: Kernel, program: Program, tries: int | None = None) -> str:
    """How a kernel disagrees with its program, in words, at the first `tries` sizes (None: all); empty if nowhere."""
    with torch.no_grad():
        found = ((size, _differs(kernel, program, size)) for size in program.sizes[:tries])
        return next((f"at size {size}: {words}" for size, words in found if words), "")


def _differs(kernel: Kernel, program: Program, size: int) -> str:
    wanted, got = program.arguments(size), program.arguments(size)
    program.reference(*wanted)
    kernel(*got)
    for mine, other in zip(_tensors(wanted), _tensors(got), strict=True):
        largest = _largest(mine.masked_fill(~mine.isfinite(), 0))
        error = _largest((mine.double() - other.double()).masked_fill(mine == other, 0.0))
        if not error <= ROUNDING.get(mine.dtype, 0.0) * largest:
            return f"off by {error:.3g} where the largest is {largest:.3g}"
    return ""


def _tensors(arguments: Iterable[Argument]) -> list[torch.Tensor]:
    return [argument for argument in arguments if isinstance(argument, torch.Tensor)]


def _largest(tensor: torch.Tensor) -> float:
    return tensor.double().abs().max().item() if tensor.numel() else 0.0
