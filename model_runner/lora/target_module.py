"""One module that an adapter changes, as formats and variants see it: sizes, rank, scaling and change.

Does not depend on tensor names, files and pages. Legend: I in features, O out features of the module, r its rank in the
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
"""A term of the normal form. A format that rotates the inputs (OFT) would need another term: an operator."""


@dataclass(frozen=True)
class Target:
    """One targeted module: its rank and the scaling to fold into B. `initial_rank`: the rank before training."""

    module: str
    rank: int
    scaling: float
    initial_rank: int = 0


@dataclass(frozen=True)
class Module:
    """A module that an adapter changes: its rank and scaling from the config, and its sizes."""

    target: Target
    in_features: int
    out_features: int
    embeds: bool = False


@dataclass(frozen=True, eq=False)
class Change:
    """The change to one module in float32: A [R, I], B [R, O] already scaled, gain [O], bias [O]."""

    a: torch.Tensor | None = None
    b: torch.Tensor | None = None
    gain: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    full_weight: torch.Tensor | None = None


class BaseSlice(Protocol):
    """The base model's weights of one slice of a module, which are read on demand."""

    @property
    def out_features(self) -> int:
        """Output columns of the slice."""

    def weight(self) -> torch.Tensor:
        """Returns the base's weight, [columns, I]."""

    def row_squares(self) -> torch.Tensor:
        """Returns |W|^2 of each row of the weight, [columns] float32."""

    def bias(self) -> torch.Tensor:
        """Returns the base's bias, [columns]. Raises AdapterError if the model has none."""


BaseSlices = Sequence[BaseSlice]
"""All slices of one module, side by side."""


def missing(module: Module, part: str, found: Mapping[str, Shape]) -> AdapterError:
    """Returns the error for a module that lacks `part`; `found` are the parts that it has."""
    has = ", ".join(sorted(found)) or "nothing"
    return AdapterError(f"module {module.target.module} has no {part} (it has {has})")
