"""What is compiled: a Function names it in numbers, its Program is the arithmetic and sane arguments to try it on.

Knows nothing of compilers, files and processes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from torch import nn

Kernel = Callable[[list[torch.Tensor]], list[torch.Tensor]]
"""Tensors in, fresh tensors out; what the function writes to is written in place. Nothing is checked at a call: dtypes,
static sizes and contiguity must be those of the program's arguments."""

ROUNDING = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 1e-5}


class Function(msgspec.Struct, frozen=True):
    """One pure function: its name in FUNCTIONS, and what its code holds as constants: sizes, a dtype, numbers; at most
    so many `threads` compute one call, 0: as many as the runner has.
    """

    name: str
    sizes: tuple[int, ...] = ()
    dtype: str = "bfloat16"
    numbers: tuple[float, ...] = ()
    threads: int = 0

    def __str__(self) -> str:
        return f"{self.name}({', '.join(map(str, (*self.sizes, *self.numbers)))}) in {self.dtype}"


@dataclass(frozen=True)
class Program:
    """A function as torch computes it.

    module          tensors in, one tensor, a tuple of them, or () out; no control flow that depends on values
    arguments       valid ones for a size, drawn by `Draw`: all dynamic dimensions follow from that one number
    dynamic         for each argument its dimensions that vary, by number: {0: "T"}; None: none does. Those of one
                    name are equal, and may be anything from 1 on
    source          C++ that computes the same, where the module's own code would be slow: then the module is only what
                    it is held against, may do whatever it likes, and `dynamic` says nothing
    defines         what the source is compiled with
    sizes           those it is tried on
    tolerance       of an element, as a share of the largest; None: the dtype's rounding
    exact           rounds intermediate results where torch does: the same bits, in up to 1.4 of the time
    """

    module: nn.Module
    arguments: Callable[[int], tuple[torch.Tensor, ...]]
    dynamic: tuple[dict[int, str] | None, ...] = ()
    source: Path | None = None
    defines: tuple[str, ...] = ()
    sizes: tuple[int, ...] = (1, 2, 7, 32)
    tolerance: float | None = None
    exact: bool = True


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
    ours = list(program.arguments(size))
    theirs = [tensor.clone() for tensor in ours]
    given = program.module(*ours)
    wanted = [given] if isinstance(given, torch.Tensor) else list(given)
    got = kernel(theirs)
    if [(tensor.shape, tensor.dtype) for tensor in got] != [(tensor.shape, tensor.dtype) for tensor in wanted]:
        return f"{[tuple(tensor.shape) for tensor in got]} instead of {[tuple(tensor.shape) for tensor in wanted]}"
    for mine, other in zip([*wanted, *ours], [*got, *theirs], strict=True):  # arguments too: they may be written to
        bound = program.tolerance if program.tolerance is not None else ROUNDING.get(mine.dtype, 0.0)
        largest = _largest(mine.masked_fill(~mine.isfinite(), 0))
        error = _largest((mine.double() - other.double()).masked_fill(mine == other, 0.0))
        if not error <= bound * largest:
            return f"off by {error:.3g} where the largest is {largest:.3g}"
    return ""


def _largest(tensor: torch.Tensor) -> float:
    return tensor.double().abs().max().item() if tensor.numel() else 0.0
