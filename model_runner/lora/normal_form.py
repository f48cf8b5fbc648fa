"""The normal form: every adapter format is converted to it, so that pages and kernels know nothing of formats.

    y = gain * (x W^T) + b + sum over slices (x A^T) B + bias        A [r, in], B [r, out of the slice]

W and b are the base's. The scaling (alpha, rsLoRA, patterns) is folded into B. A lane's scale multiplies the difference
that an adapter makes, so a mix is the weighted sum: b + x W^T + sum of scale * ((gain - 1) * (x W^T) + ...).
The tensors are in host memory. Knows nothing of pages, lanes or files.
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

    `gain` and `bias` are float32 [out of the slice]; None means 1 and 0. `full_weight` replaces the base's weight; its
    rows are another number where the adapter has a vocabulary of its own.
    """

    a: torch.Tensor
    b: torch.Tensor
    gain: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    full_weight: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        """r."""
        return int(self.a.shape[0])

    @property
    def has_vectors(self) -> bool:
        """Whether it has a gain or a bias, which need a vector slot."""
        return self.gain is not None or self.bias is not None

    @property
    def bytes(self) -> int:
        """Bytes of all its tensors."""
        parts = (self.a, self.b, self.gain, self.bias, self.full_weight)
        return sum(part.numel() * part.element_size() for part in parts if part is not None)


Deltas = Mapping[str, tuple[Delta | None, ...]]
"""By site name: one entry for each slice of the site, None where the adapter does not change it."""


@dataclass(frozen=True, eq=False)
class NormalForm:
    """One adapter in the host tier.

    revision   content hash: the bytes that were loaded and the settings that scale them
    rank       the highest rank of any slice
    targets    sorted names of the modules it touches ("q_proj")
    cast_from  float dtypes of its files that differ from the serving dtype (empty: nothing was cast)
    vocab_size tokens of its own vocabulary; 0: it has the base's
    invocation the adapter acts from the last occurrence of these tokens in a prompt on (none: from the first token on)
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


def pages_for(rank: int) -> int:
    """How many rank pages hold `rank` units."""
    return -(-rank // PAGE_RANK)


def lane_pages(max_rank: int) -> int:
    """Pages of one group in the longest lane: twice those of the largest adapter, so that two can be mixed."""
    return 2 * pages_for(max_rank)


def vocabulary(deltas: Deltas, sites: Mapping[str, Site]) -> int:
    """Tokens of an adapter's own vocabulary; 0: it has the base's."""
    for name, slices in deltas.items():
        for delta in slices:
            if delta is not None and delta.full_weight is not None:
                rows = len(delta.full_weight)
                if rows != sites[name].vocabulary:
                    return rows
    return 0


def footprint(deltas: Deltas, sites: Mapping[str, Site]) -> Footprint:
    """Rank pages by group, of its highest rank; vector slots for gains and biases; matrix slots."""
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
