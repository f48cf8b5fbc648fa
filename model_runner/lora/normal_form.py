"""The normal form: every adapter format is converted to it, so that pages and kernels do not depend on formats.

    y = gain * (x W^T) + b + sum over slices (x A^T) B + bias        A [r, in], B [r, out of the slice]

W and b are the base's weight and bias. The scaling (alpha, rsLoRA, patterns) is folded into B. A lane's scale
multiplies an adapter's difference from the base, so a mix is the weighted sum b + x W^T + sum of
scale * ((gain - 1) * (x W^T) + ...). The tensors are in host memory. Does not depend on pages, lanes or files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from engine.messages import Footprint
from model_runner.lora.site import Site, full_weights_of, vectors_of

PAGE_RANK = 16
"""Units of LoRA rank in one rank page."""

MAX_RANK = 512
"""The highest rank that is served."""


@dataclass(frozen=True, eq=False)
class Delta:
    """The change that an adapter makes to one slice of one site; with rank 0, A and B are empty.

    `gain` and `bias` are float32 [out of the slice]; None means 1 and 0. `full_weight` replaces the base's weight; it
    has another number of rows where the adapter has its own vocabulary.
    """

    a: torch.Tensor
    b: torch.Tensor
    gain: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    full_weight: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        """r, the rank of A and B."""
        return int(self.a.shape[0])

    @property
    def has_vectors(self) -> bool:
        """Whether the delta has a gain or a bias, which need a vector slot."""
        return self.gain is not None or self.bias is not None

    @property
    def bytes(self) -> int:
        """The bytes of all tensors of the delta."""
        parts = (self.a, self.b, self.gain, self.bias, self.full_weight)
        return sum(part.numel() * part.element_size() for part in parts if part is not None)


Deltas = Mapping[str, tuple[Delta | None, ...]]
"""Deltas by site name: one for each slice of the site, None where the adapter does not change the slice."""


@dataclass(frozen=True, eq=False)
class NormalForm:
    """One adapter in the host tier.

    revision   content hash: the bytes that were loaded and the settings that scale them
    rank       the highest rank of any slice
    targets    sorted names of the modules that the adapter changes ("q_proj")
    cast_from  float dtypes of its files that differ from the serving dtype (empty: nothing was cast)
    vocab_size size of the adapter's own vocabulary; 0: it has the base's
    invocation tokens from whose last occurrence in a prompt the adapter acts (empty: from the first token)
    notes      on what its config names and the model has not
    """

    adapter_id: int
    name: str
    revision: str
    rank: int
    targets: list[str]
    footprint: Footprint
    deltas: Deltas
    bytes: int
    cast_from: list[str] = field(default_factory=list)
    vocab_size: int = 0
    invocation: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def pages_for(rank: int) -> int:
    """Returns how many rank pages hold `rank` units."""
    return -(-rank // PAGE_RANK)


def lane_pages(max_rank: int) -> int:
    """Returns the most pages of one group in a lane: twice those of the largest adapter, so that two can be mixed."""
    return 2 * pages_for(max_rank)


def vocabulary(deltas: Deltas, sites: Mapping[str, Site]) -> int:
    """Returns the size of the adapter's own vocabulary in tokens, or 0 if it has the base's."""
    for name, slices in deltas.items():
        for delta in slices:
            if delta is not None and delta.full_weight is not None:
                rows = len(delta.full_weight)
                if rows != sites[name].vocabulary:
                    return rows
    return 0


def footprint(deltas: Deltas, sites: Mapping[str, Site]) -> Footprint:
    """Returns what the adapter occupies on the device, by group.

    This is rank pages for the highest rank in the group, a vector slot for gains and biases, a slot for full weights.
    """
    pages: dict[str, int] = {}
    for name, slices in deltas.items():
        group = sites[name].group
        present = [delta for delta in slices if delta is not None]
        needed = max((pages_for(delta.rank) for delta in present), default=0)
        if needed:
            pages[group] = max(pages.get(group, 0), needed)
        if any(delta.has_vectors for delta in present):
            pages[vectors_of(group)] = 1
        if any(delta.full_weight is not None for delta in present):
            pages[full_weights_of(group)] = 1
    return Footprint(pages=pages)
