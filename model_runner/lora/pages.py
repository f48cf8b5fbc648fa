"""Rank pages: the LoRA pools of all sites, filled page by page, and the table of lanes over them.

    pool of a site of group g     A [P, slices, 16, in]     B [P, 16, out]     units [P, slices]

Page p of a group means the same 16 units of rank at every site of that group. A page's unused units are zero, and so
are its sites that the adapter leaves alone: what was in a page before never shows. Knows nothing of steps; the
scheduler decides which page is whose. Legend: P pages of the group, I in features, O out features.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from engine.errors import AdapterError
from engine.messages import LanePages
from model_runner.lora.adapter import PAGE_RANK, Adapter, Delta
from model_runner.lora.site import Site
from model_runner.lora.staging import Staging

Lane = Mapping[str, Sequence[tuple[int, float]]]
"""Per group: (rank page, scale) pairs."""

Mark = torch.cuda.Event | None
"""A point in the stream of copies; None: copies are done at once."""


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
        self._staging = Staging(device) if device.type == "cuda" else None

    @property
    def bytes(self) -> int:
        """Bytes of all pools."""
        return sum(pool.bytes for pool in self.pools.values())

    def fill(self, adapter: Adapter, pages: dict[str, list[int]]) -> None:
        """Copies the adapter into these pages, by group, as many as its footprint says; nothing else changes."""
        for _ in self.pieces(adapter, pages):
            pass
        self.synchronize()

    def pieces(self, adapter: Adapter, pages: dict[str, list[int]]) -> Iterator[int]:
        """The same a page of a site at a time: each step of the iterator copies one and yields its bytes.

        No lane may name the pages before the last one was copied and `arrived` says so.
        """
        if adapter.footprint.vectors or adapter.footprint.matrices:
            raise AdapterError(f"adapter {adapter.name!r}: gains, biases and whole matrices are not supported yet")
        granted = {group: len(numbers) for group, numbers in pages.items() if numbers}
        assert granted == adapter.footprint.pages, f"granted {granted}, footprint {adapter.footprint.pages}"
        for site in self.sites:
            if site.group in granted:
                deltas = adapter.deltas.get(site.name, (None,) * len(site.slices))
                for order, page in enumerate(pages[site.group]):
                    yield self._fill_page(site, deltas, order, page)
        self.version += 1

    def mark(self) -> Mark:
        """A point after all that was copied so far."""
        return self._staging.mark() if self._staging else None

    def arrived(self, mark: Mark) -> bool:
        """Whether everything copied before `mark` is in its pages."""
        return mark is None or bool(mark.query())  # type: ignore[no-untyped-call]

    def synchronize(self) -> None:
        """Waits until everything copied so far is in its pages."""
        mark = self.mark()
        if mark is not None:
            mark.synchronize()

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

    def _fill_page(self, site: Site, deltas: Sequence[Delta | None], order: int, page: int) -> int:
        """The adapter's `order`-th 16 units at this site go into `page`; all the rest of the page becomes zero."""
        pool, first = self.pools[site.name], order * PAGE_RANK
        units_S = [0 if delta is None else max(0, min(PAGE_RANK, delta.rank - first)) for delta in deltas]
        a_SRI, b_RO = pool.a_PSRI[page], pool.b_PRO[page]
        if self._staging is None:
            _write(a_SRI, b_RO, site, deltas, units_S, first)
        else:
            with self._staging.into(a_SRI, b_RO) as (staged_a, staged_b):
                _write(staged_a, staged_b, site, deltas, units_S, first)
        pool.units_PS[page] = units_S
        return a_SRI.nbytes + b_RO.nbytes


def _write(
    a_SRI: torch.Tensor, b_RO: torch.Tensor, site: Site, deltas: Sequence[Delta | None], units_S: list[int], first: int
) -> None:
    """The units from `first` on of every slice, and zeros.

    By numpy: a copy that torch spreads over its threads waits for the slowest of them, which costs milliseconds where
    the cores are taken.
    """
    raw_a, raw_b = _raw(a_SRI), _raw(b_RO)
    if min(units_S) < PAGE_RANK:
        raw_b[...] = 0
    for index, (piece, delta, units) in enumerate(zip(site.slices, deltas, units_S, strict=True)):
        raw_a[index, units:] = 0
        if delta is not None and units:
            raw_a[index, :units] = _raw(delta.a[first : first + units].to(a_SRI.dtype))
            raw_b[:units, piece.start : piece.stop] = _raw(delta.b[first : first + units].to(b_RO.dtype))


def _raw(values: torch.Tensor) -> NDArray[Any]:
    """The same memory as integers: numpy knows no bfloat16, and a copy need not."""
    raw: NDArray[Any] = values.view(torch.int16 if values.itemsize == 2 else torch.int32).numpy()
    return raw
