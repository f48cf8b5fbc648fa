"""LoKr (2309.14859): a Kronecker product, which equals one matrix of rank rank(W1) * rank(W2).

    W1 kron W2 = (U1 kron U2) (V1 kron V2)      W1 = U1 V1 [a, c]    W2 = U2 V2 [b, d]    O = a * b    I = c * d

Either factor is a full matrix (U or V is the identity, on the shorter side) or a product of two thin ones. W2 may be in
Tucker form, with a core between the thin ones: W2 = lokr_w2_a^T core lokr_w2_b.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch

from engine.errors import AdapterError
from model_runner.lora.formats.base import PeftFormat
from model_runner.lora.formats.loha import LYCORIS_TRAINING
from model_runner.lora.target_module import Change, Module, Shape, Term, missing
from model_runner.lora.variants.saved_modules import SavedModules


class LoKr(PeftFormat, frozen=True, kw_only=True):
    """The two factors of LoKr, each a full matrix or a product of two thin ones."""

    peft_type: ClassVar = "LOKR"
    highest_rank: ClassVar = 1 << 31  # a rank above the sizes of a module means two full factors
    name: ClassVar = "LoKr"
    note: ClassVar = "A and B of rank rank(W1) * rank(W2); where that is above 512 (two full factors), it is refused"
    becomes: ClassVar = frozenset[Term]({"A", "B"})
    parts: ClassVar = frozenset({
        "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2",
    })  # fmt: skip
    variants: ClassVar = (SavedModules,)
    harmless: ClassVar = LYCORIS_TRAINING | {"decompose_both", "decompose_factor", "rank_dropout_scale"}

    r: int = 8
    alpha: float = 8

    def shapes(self, module: Module, found: Mapping[str, Shape]) -> dict[str, Shape]:
        """Returns the shapes, taken from the file because the config lacks the sizes of the factors.

        Raises AdapterError unless the factors make [O, I].
        """
        (a, c), (b, d) = (_size(module, which, found) for which in ("lokr_w1", "lokr_w2"))
        if a * b != module.out_features or c * d != module.in_features:
            raise AdapterError(
                f"module {module.target.module}: lokr_w1 [{a}, {c}] and lokr_w2 [{b}, {d}] do not make"
                f" [{module.out_features}, {module.in_features}] (it has {', '.join(sorted(found))})"
            )
        rank, shapes = module.target.rank, {}
        for which, (rows, columns) in (("lokr_w1", (a, c)), ("lokr_w2", (b, d))):
            if which in found:
                shapes[which] = [rows, columns]
                continue
            tucker = which == "lokr_w2" and "lokr_t2" in found
            shapes[f"{which}_a"] = [rank, rows] if tucker else [rows, rank]
            shapes[f"{which}_b"] = [rank, columns]
            if tucker:
                shapes["lokr_t2"] = [rank, rank, *[1] * (len(found["lokr_t2"]) - 2)]
        return shapes

    def rank(self, module: Module, found: Mapping[str, Shape]) -> int:
        """Returns rank(W1) * rank(W2), with the highest rank that the shapes of the factors allow."""
        rank = module.target.rank
        return math.prod(min(found[which]) if which in found else rank for which in ("lokr_w1", "lokr_w2"))

    def change(self, module: Module, tensors: Mapping[str, torch.Tensor]) -> Change:
        """Returns A = V1 kron V2 and B = scaling * (U1 kron U2)^T."""
        (u1, v1), (u2, v2) = (_thin(which, tensors) for which in ("lokr_w1", "lokr_w2"))
        return Change(torch.kron(v1, v2), torch.kron(u1, u2).t() * module.target.scaling)


def _size(module: Module, which: str, found: Mapping[str, Shape]) -> tuple[int, int]:
    """Returns the rows and columns of a factor. Raises AdapterError if one of its matrices is missing."""
    names = [which] if which in found else [f"{which}_a", f"{which}_b"]
    for name in names:
        if len(found.get(name, [])) != 2:
            raise missing(module, f"matrix {name}", found)
    if which in found:
        rows, columns = found[which]
        return rows, columns
    tucker = which == "lokr_w2" and "lokr_t2" in found
    return found[names[0]][tucker], found[names[1]][1]


def _thin(which: str, tensors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns U and V of a factor."""
    full = tensors.get(which)
    if full is None:
        u, v = tensors[f"{which}_a"], tensors[f"{which}_b"]
        core = tensors.get("lokr_t2") if which == "lokr_w2" else None
        return (u, v) if core is None else (u.t().contiguous(), core.reshape(len(u), -1) @ v)
    rows, columns = full.shape
    return (full, torch.eye(columns)) if columns < rows else (torch.eye(rows), full)
