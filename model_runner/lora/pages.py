"""Rank pages: the LoRA pools of all sites, filled page by page, and the table of lanes over them.

    pool of a site of group g     A [P, slices, 16, in]     B [P, 16, out]     units [P, slices]

Page p of a group means the same 16 units of rank at every site of that group. A page's unused units are zero, and so
are its sites that the adapter leaves alone: what was in a page before never shows. Knows nothing of steps; the
scheduler decides which page is whose. Legend: P pages of the group, I in features, O out features.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from engine.errors import AdapterError
from engine.messages import LanePages
from model_runner.lora.adapter import PAGE_RANK, Adapter, Delta
from model_runner.lora.site import Site

Lane = Mapping[str, Sequence[tuple[int, float]]]
"""Per group: (rank page, scale) pairs."""


def page_bytes(sites: Iterable[Site], dtype: torch.dtype) -> dict[str, int]:
    """Bytes of one rank page of each group."""
    sizes: dict[str, int] = {}
    for site in sites:
        columns = len(site.slices) * site.in_features + site.out_features
        sizes[site.group] = sizes.get(site.group, 0) + PAGE_RANK * columns * dtype.itemsize
    return sizes


@dataclass(frozen=True, eq=False)
class SitePool:
    """The pages of one site. `units` says how many of a page's 16 units are real, by slice (0: untouched)."""

    a_PSRI: torch.Tensor
    b_PRO: torch.Tensor
    units_PS: NDArray[np.int32]

    @property
    def bytes(self) -> int:
        """Bytes of both tensors."""
        return sum(pool.numel() * pool.element_size() for pool in (self.a_PSRI, self.b_PRO))


class RankPages:
    """The pools by site name, and the lanes. `pages` says how many pages each group has; without any, no pool."""

    def __init__(
        self, sites: Sequence[Site], pages: dict[str, int], max_lanes: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.sites = list(sites)
        self.pages = dict(pages)
        self.max_lanes = max_lanes
        self.dtype = dtype
        self.device = device
        self.version = 0
        self.lanes: dict[int, Lane] = {}
        self.pools = {site.name: self._pool(site) for site in sites if pages.get(site.group, 0)}

    @property
    def bytes(self) -> int:
        """Bytes of all pools."""
        return sum(pool.bytes for pool in self.pools.values())

    def fill(self, adapter: Adapter, pages: dict[str, list[int]]) -> None:
        """Copies the adapter into these pages, by group, as many as its footprint says; nothing else changes."""
        if adapter.footprint.vectors or adapter.footprint.matrices:
            raise AdapterError(f"adapter {adapter.name!r}: gains, biases and whole matrices are not supported yet")
        granted = {group: len(numbers) for group, numbers in pages.items() if numbers}
        assert granted == adapter.footprint.pages, f"granted {granted}, footprint {adapter.footprint.pages}"
        for site in self.sites:
            if site.group in granted:
                deltas = adapter.deltas.get(site.name, (None,) * len(site.slices))
                for order, page in enumerate(pages[site.group]):
                    self._fill_page(site, deltas, order, page)
        self.version += 1

    def set_lane(self, lane: LanePages) -> None:
        """Lane `lane.lane` from now on; a group that is not named has no delta."""
        assert 1 <= lane.lane <= self.max_lanes, f"lane {lane.lane} of {self.max_lanes}"
        for group, pairs in lane.pages.items():
            count = self.pages.get(group, 0)
            assert all(0 <= page < count for page, _ in pairs), f"lane {lane.lane}: {group} has {count} pages"
        self.lanes[lane.lane] = {group: tuple(pairs) for group, pairs in lane.pages.items() if pairs}
        self.version += 1

    def reset_lanes(self) -> None:
        """Forgets every lane; the pages keep what they hold."""
        self.lanes.clear()
        self.version += 1

    def _pool(self, site: Site) -> SitePool:
        count, slices = self.pages[site.group], len(site.slices)
        return SitePool(
            torch.zeros(count, slices, PAGE_RANK, site.in_features, dtype=self.dtype, device=self.device),
            torch.zeros(count, PAGE_RANK, site.out_features, dtype=self.dtype, device=self.device),
            np.zeros((count, slices), dtype=np.int32),
        )

    def _fill_page(self, site: Site, deltas: Sequence[Delta | None], order: int, page: int) -> None:
        """The adapter's `order`-th 16 units at this site go into `page`; all the rest of the page becomes zero."""
        pool = self.pools[site.name]
        pool.a_PSRI[page].zero_()
        pool.b_PRO[page].zero_()
        pool.units_PS[page] = 0
        first = order * PAGE_RANK
        for index, (piece, delta) in enumerate(zip(site.slices, deltas, strict=True)):
            units = 0 if delta is None else min(PAGE_RANK, delta.rank - first)
            if delta is None or units <= 0:
                continue
            pool.a_PSRI[page, index, :units] = delta.a[first : first + units].to(self.device)
            pool.b_PRO[page, :units, piece.start : piece.stop] = delta.b[first : first + units].to(self.device)
            pool.units_PS[page, index] = units
