"""The lanes as arrays, group by group: pages, scales and used units, built again only when lanes or pages changed.

    group "qkv"     pages [lanes + 1, K]   scales [lanes + 1, K]   units [lanes + 1, K]   counts [lanes + 1]

Row 0 is the base, which has no pages. `units` packs how many units of a page are in use, eight bits a slice. It is -1
where the sites of the group differ: there the kernels read `site_units`, a table on the device. Pages that no site uses
and pages of scale 0 are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from model_runner.lora.pool.pages import Lane, RankPagePool
from model_runner.lora.pool.site_pools import SitePool
from model_runner.lora.pool.upload import Upload
from model_runner.lora.site import vectors_of

ALIGNED = 4
"""Every site's units begin at a multiple of ALIGNED int32: triton compiles another variant for unaligned pointers."""


@dataclass(frozen=True, eq=False)
class GroupLanes:
    """The lanes in one group of pages or vector slots, L = lanes + 1."""

    pages_LK: NDArray[np.int32]
    scales_LK: NDArray[np.float32]
    units_LK: NDArray[np.int32]
    counts_L: NDArray[np.int32]


class LaneTables:
    """The arrays of all groups. Call `refresh` before `groups` is read.

    `most` is how many pages a lane may name in a group.
    """

    def __init__(self, pages: RankPagePool, most: int, upload: Upload) -> None:
        self.groups: dict[str, GroupLanes] = {}
        known = {name for site in pages.sites for name in (site.group, vectors_of(site.group))}
        self.most = {group: min(most, count) for group, count in pages.page_counts.items() if count and group in known}
        self._pages, self._upload = pages, upload
        self._version = -1
        self._pools: dict[str, list[SitePool]] = {}
        self._offsets: dict[str, int] = {}
        total = 0
        for site in pages.sites:
            if site.name in pages.pools:
                pool = pages.pools[site.name]
                self._pools.setdefault(site.group, []).append(pool)
                self._offsets[site.name] = total
                total += -(-pool.units_PS.size // ALIGNED) * ALIGNED
        self._site_units = torch.zeros(total, dtype=torch.int32, device=pages.device)

    def site_units(self, name: str) -> torch.Tensor:
        """Returns the used units of each page at one site, [P * S] int32 on the device. The address never changes."""
        begin = self._offsets[name]
        return self._site_units[begin : begin + self._pages.pools[name].units_PS.size]

    def refresh(self) -> bool:
        """Rebuilds the arrays if lanes or pages changed. Returns whether it rebuilt them."""
        if self._version == self._pages.version:
            return False
        self._version = self._pages.version
        packed = {group: _pack([pool.units_PS for pool in pools]) for group, pools in self._pools.items()}
        self.groups = {group: self._group_lanes(group, packed.get(group)) for group in self.most}
        if any((lanes.units_LK < 0).any() for lanes in self.groups.values()):
            self._upload_units()
        return True

    def _group_lanes(self, group: str, packed_P: NDArray[np.int32] | None) -> GroupLanes:
        shape = (self._pages.max_lanes + 1, self.most[group])
        lanes = GroupLanes(
            np.zeros(shape, np.int32),
            np.zeros(shape, np.float32),
            np.zeros(shape, np.int32),
            np.zeros(shape[0], np.int32),
        )
        for lane, held in self._pages.lanes.items():
            pairs = _effective(held, group, packed_P)
            count = len(pairs)
            assert count <= shape[1], f"lane {lane} names {count} pages of {group}, at most {shape[1]} are possible"
            if count:
                lanes.pages_LK[lane, :count], lanes.scales_LK[lane, :count] = zip(*pairs, strict=True)
                lanes.counts_L[lane] = count
        if packed_P is not None:
            lanes.units_LK[...] = packed_P[lanes.pages_LK]
        return lanes

    def _upload_units(self) -> None:
        table = self._upload.buffer(self._site_units.numel())
        for name, begin in self._offsets.items():
            units_PS = self._pages.pools[name].units_PS
            table[begin : begin + units_PS.size] = units_PS.ravel()
        self._upload.send(self._site_units.numel(), self._site_units)


def _effective(lane: Lane, group: str, packed_P: NDArray[np.int32] | None) -> list[tuple[int, float]]:
    """Returns the lane's (page, scale) pairs that have an effect: a scale other than 0, a page that a site uses."""
    return [(page, scale) for page, scale in lane.get(group, ()) if scale and (packed_P is None or packed_P[page] != 0)]


def _pack(units: list[NDArray[np.int32]]) -> NDArray[np.int32]:
    """Returns the units of each page's slices, [P], eight bits each, or -1 where the sites differ."""
    units_NPS = np.stack(units)
    packed = (units_NPS[0] << (8 * np.arange(units_NPS.shape[2]))).sum(axis=1)
    return np.where((units_NPS == units_NPS[0]).all(axis=(0, 2)), packed, -1).astype(np.int32)
