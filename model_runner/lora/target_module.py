"""One module that an adapter changes, as formats and variants see it: sizes, rank and scaling, and the change itself.

Knows nothing of tensor names, files and pages. Legend: I in features, O out features of the module, r its rank in the
config, R its rank in the normal form.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from engine.errors import AdapterError

Shape = list[int]

Term = Literal["A", "B", "gain", "bias", "full weight"]
"""A term of the normal form. A format that rotates the inputs (OFT) would need another: an operator."""


@dataclass(frozen=True)
class Target:
    """One targeted module: its rank and the scaling to fold into B; `initial_rank`: that which training began with."""

    module: str
    rank: int
    scaling: float
    initial_rank: int = 0


@dataclass(frozen=True)
class Module:
    """A targeted module: its rank and scaling by the config, and its sizes."""

    target: Target
    in_features: int
    out_features: int
    embeds: bool = False


@dataclass(frozen=True, eq=False)
class Change:
    """The change to one module in float32: A [R, I], B [R, O] with the scaling in it, gain [O], bias [O]."""

    a: torch.Tensor | None = None
    b: torch.Tensor | None = None
    gain: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    full_weight: torch.Tensor | None = None


class BaseSlice(Protocol):
    """The base model's own weights of one slice of a module, read from its checkpoint when they are asked for."""

    @property
    def out_features(self) -> int:
        """Output columns of the slice."""

    def weight(self) -> torch.Tensor:
        """[columns, I]."""

    def row_squares(self) -> torch.Tensor:
        """[columns] float32: |W|^2 by row."""

    def bias(self) -> torch.Tensor:
        """[columns]. Raises AdapterError where the model has none."""


BaseSlices = Sequence[BaseSlice]
"""All slices of one module, side by side."""


def missing(module: Module, part: str, found: Mapping[str, Shape]) -> AdapterError:
    """The error for a module that lacks a part."""
    has = ", ".join(sorted(found)) or "nothing"
    return AdapterError(f"module {module.target.module} has no {part} (it has {has})")
