"""The device memory of one site: its rank pages, its vector slots, its full-weight slots; and the bytes of one of each.

    rank pages      A [P, slices, 16, in]     B [P, 16, out]     units [P, slices]
    of embeddings   A [P, 1, vocabulary, 16]  B [P, 16, out]     a token's 16 units are adjacent
    vectors         gain less one [V, out]    bias [V, out]      float32, one slot per adapter
    full weights    [slots, vocabulary + extra, hidden]          embedding and head, one slot per adapter

Does not depend on lanes and adapters. Legend: P pages of the group, R = 16 units of a page, S slices, I in features, O
out features, V vector slots; of full weights S slots, V vocabulary, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from model_runner.lora.normal_form import PAGE_RANK
from model_runner.lora.site import NORMS, Site, full_weights_of, vectors_of


def page_bytes(sites: Iterable[Site], dtype: torch.dtype, extra_vocab: int = 0) -> dict[str, int]:
    """Returns the bytes of one rank page, one vector slot and one full-weight slot, by group.

    A full weight has room for `extra_vocab` more tokens than the base.
    """
    sizes: dict[str, int] = {}
    for site in sites:
        for group, size in _site_bytes(site, dtype, extra_vocab).items():
            sizes[group] = sizes.get(group, 0) + size
    return sizes


def _site_bytes(site: Site, dtype: torch.dtype, extra_vocab: int) -> dict[str, int]:
    if site.group == NORMS:
        return {full_weights_of(NORMS): site.out_features * torch.float32.itemsize}
    columns = len(site.slices) * site.in_features + site.out_features
    sizes = {
        site.group: PAGE_RANK * columns * dtype.itemsize,
        vectors_of(site.group): 2 * site.out_features * torch.float32.itemsize,
    }
    if site.replaceable:
        rows = site.vocabulary + extra_vocab
        sizes[full_weights_of(site.group)] = rows * site.base.shape[1] * dtype.itemsize
    return sizes


@dataclass(frozen=True, eq=False)
class SitePool:
    """The rank pages of one site. `units_PS`: how many of a page's 16 units are in use, by slice (0: no change)."""

    a_PSRI: torch.Tensor
    b_PRO: torch.Tensor
    units_PS: NDArray[np.int32]

    @classmethod
    def create(cls, site: Site, pages: int, dtype: torch.dtype, device: torch.device) -> SitePool:
        """Returns a pool of `pages` pages of zeros."""
        units = (site.in_features, PAGE_RANK) if site.embeds else (PAGE_RANK, site.in_features)
        return cls(
            torch.zeros(pages, len(site.slices), *units, dtype=dtype, device=device),
            torch.zeros(pages, PAGE_RANK, site.out_features, dtype=dtype, device=device),
            np.zeros((pages, len(site.slices)), dtype=np.int32),
        )

    @property
    def bytes(self) -> int:
        """Bytes of both tensors."""
        return self.a_PSRI.nbytes + self.b_PRO.nbytes


@dataclass(frozen=True, eq=False)
class VectorPool:
    """The vector slots of one site, as float32. `held_V`: whether a slot holds a gain or bias of this site.

    y += scale * (gain_less_one * (x W^T) + bias), where x W^T is without the base's bias.
    """

    gain_VO: torch.Tensor
    bias_VO: torch.Tensor
    held_V: NDArray[np.bool_]

    @classmethod
    def create(cls, site: Site, slots: int, device: torch.device) -> VectorPool:
        """Returns a pool of `slots` slots of zeros."""
        gain, bias = (torch.zeros(slots, site.out_features, dtype=torch.float32, device=device) for _ in range(2))
        return cls(gain, bias, np.zeros(slots, dtype=np.bool_))

    @property
    def bytes(self) -> int:
        """Bytes of both tensors."""
        return self.gain_VO.nbytes + self.bias_VO.nbytes


@dataclass(frozen=True, eq=False)
class FullWeightPool:
    """The full-weight slots of one site. `vocab_S`: how many rows of a slot are in use, its adapter's vocabulary."""

    weight_SVH: torch.Tensor
    vocab_S: NDArray[np.int64]

    @classmethod
    def create(
        cls, site: Site, slots: int, extra_vocab: int, dtype: torch.dtype, device: torch.device
    ) -> FullWeightPool:
        """Returns a pool of `slots` slots of zeros, each with room for `extra_vocab` more tokens than the base."""
        rows = site.vocabulary + extra_vocab
        weight_SVH = torch.zeros(slots, rows, site.base.shape[1], dtype=dtype, device=device)
        return cls(weight_SVH, np.full(slots, site.vocabulary))

    @property
    def bytes(self) -> int:
        """Bytes of all slots."""
        return self.weight_SVH.nbytes

    def weight(self, slot: int) -> torch.Tensor:
        """Returns the full weight in a slot, [vocabulary of its adapter, H]."""
        return self.weight_SVH[slot, : int(self.vocab_S[slot])]
