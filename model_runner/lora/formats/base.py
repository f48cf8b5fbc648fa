"""What a format is: the parts of a module that it reads, their shapes, and the A and B that they make.

Knows nothing of files, names of modules and pages. Legend: I in features, O out features of the module, r its rank in
the config, R its rank in the normal form.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from engine.errors import AdapterError

Shape = list[int]


@dataclass(frozen=True)
class Target:
    """One targeted module: its rank and the scaling to fold into B; `began`: the rank it was trained with at first."""

    module: str
    rank: int
    scaling: float
    began: int = 0


@dataclass(frozen=True)
class Module:
    """A targeted module: its rank and scaling by the config, and its sizes."""

    target: Target
    in_features: int
    out_features: int
    embeds: bool = False


class Format(ABC):
    """One format. `parts` are all parts that it may read of a module; `note` says what it becomes, for people."""

    name: str
    note: str
    parts: frozenset[str]

    @abstractmethod
    def shapes(self, module: Module, found: Mapping[str, Shape]) -> dict[str, Shape]:
        """The parts that the module must have and their shapes, given those it has (which may decide the variant)."""

    @abstractmethod
    def rank(self, module: Module, found: Mapping[str, Shape]) -> int:
        """R."""

    @abstractmethod
    def factors(self, module: Module, tensors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """A [R, I] and B [R, O], scaled, from float32 tensors: the change of the weight is B^T A."""


def missing(module: Module, part: str, found: Mapping[str, Shape]) -> AdapterError:
    """The error for a module that lacks a part."""
    has = ", ".join(sorted(found)) or "nothing"
    return AdapterError(f"module {module.target.module} has no {part} (it has {has})")
