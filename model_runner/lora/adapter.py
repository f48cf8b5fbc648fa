"""The normal form: what every adapter format becomes, so that pages and kernels know nothing of formats.

    y = gain * y_base + sum over slices (x A^T) B + bias        A [r, in], B [r, out of the slice]

Scaling (alpha, rsLoRA, patterns) is folded into B. Lives on the host; knows nothing of pages, lanes or files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from engine.messages import Footprint
from model_runner.lora.site import Site

PAGE_RANK = 16
"""Units of LoRA rank in one rank page."""

MAX_RANK = 512
"""The highest rank that is served at all."""


@dataclass(frozen=True, eq=False)
class Delta:
    """What an adapter does to one slice of one site. `gain` and `bias` are per output column, or None."""

    a: torch.Tensor
    b: torch.Tensor
    gain: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        """r."""
        return int(self.a.shape[0])

    @property
    def bytes(self) -> int:
        """Bytes of all its tensors."""
        parts = (self.a, self.b, self.gain, self.bias)
        return sum(part.numel() * part.element_size() for part in parts if part is not None)


Deltas = Mapping[str, tuple[Delta | None, ...]]
"""By site name: one entry for each slice of the site, None where the adapter leaves it alone."""


@dataclass(frozen=True, eq=False)
class Adapter:
    """One adapter in the host tier.

    revision   content hash: the bytes that were loaded and the settings that scale them
    rank       the highest rank of any slice
    targets    sorted names of the modules it touches ("q_proj")
    cast_from  float dtypes of its files that differ from the serving dtype (empty: nothing was cast)
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


def pages_for(rank: int) -> int:
    """How many rank pages hold `rank` units."""
    return -(-rank // PAGE_RANK)


def footprint(deltas: Deltas, sites: Mapping[str, Site]) -> Footprint:
    """Pages for each touched group (its highest rank decides), and how many sites need a vector slot."""
    pages: dict[str, int] = {}
    vectors = 0
    for name, slices in deltas.items():
        present = [delta for delta in slices if delta is not None]
        needed = max((pages_for(delta.rank) for delta in present), default=0)
        if needed:
            group = sites[name].group
            pages[group] = max(pages.get(group, 0), needed)
        vectors += any(delta.gain is not None or delta.bias is not None for delta in present)
    return Footprint(pages=pages, vectors=vectors)
