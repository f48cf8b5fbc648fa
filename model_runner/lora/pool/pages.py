"""The rank pages of all sites, and the table of lanes over them.

    group "g"           rank pages, A and B at every site of the group
    group "g.vectors"   vector slots: gains and biases, one slot per adapter
    group "g.full"      full weights of the embedding or the head, one slot per adapter
    group "norms.full"  all norms of the model, one slot per adapter (pool/norms.py)

Page p of a group holds the same 16 units of rank at every site of the group. Slots are granted in the same way. The
scheduler decides which adapter has which page; a lane names pages and their scales. Does not depend on steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from engine.messages import LanePages
from model_runner.lora.normal_form import NormalForm
from model_runner.lora.pool.norms import NormPool
from model_runner.lora.pool.page_writer import PageWriter
from model_runner.lora.pool.site_pools import FullWeightPool, SitePool, VectorPool
from model_runner.lora.pool.staging import Staging
from model_runner.lora.site import NORMS, Site, full_weights_of, vectors_of

Lane = Mapping[str, Sequence[tuple[int, float]]]
"""The (rank page or slot, scale) pairs of a lane, by group."""

CopyEvent = torch.cuda.Event | None
"""A point in the copy stream; None where copies are synchronous."""


class RankPagePool:
    """The pools by site name, and the lanes. `page_counts` is the number of pages by group: with 0 there is no pool.

    Full weights may have `extra_vocab` rows more than the base's. `version` grows with every change of lanes or pages.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        page_counts: dict[str, int],
        max_lanes: int,
        dtype: torch.dtype,
        device: torch.device,
        extra_vocab: int = 0,
    ) -> None:
        self.sites = list(sites)
        self.extra_vocab = extra_vocab
        self.page_counts = dict(page_counts)
        self.max_lanes = max_lanes
        self.dtype = dtype
        self.device = device
        self.version = 0
        self.lanes: dict[int, Lane] = {}
        self.pools: dict[str, SitePool] = {}
        self.vectors: dict[str, VectorPool] = {}
        self.full_weights: dict[str, FullWeightPool] = {}
        for site in sites:
            self._create_pools(site)
        slots = page_counts.get(full_weights_of(NORMS), 0)
        self.norms = NormPool(sites, slots, max_lanes, device) if slots else None
        self._staging = Staging(device) if device.type == "cuda" else None
        self._writer = PageWriter(self.pools, self.vectors, self.full_weights, self.norms, self._staging)

    @property
    def bytes(self) -> int:
        """Bytes of all pools."""
        total = sum(pool.bytes for pool in self.pools.values())
        total += sum(pool.bytes for pool in self.vectors.values())
        total += sum(pool.bytes for pool in self.full_weights.values())
        return total + (self.norms.bytes if self.norms else 0)

    def fill(self, adapter: NormalForm, pages: dict[str, list[int]]) -> None:
        """Copies the adapter into `pages`, by group, as many as its footprint says, and waits for the copies."""
        for _ in self.copy_pieces(adapter, pages):
            pass
        self.synchronize()

    def copy_pieces(self, adapter: NormalForm, pages: dict[str, list[int]]) -> Iterator[int]:
        """Copies the adapter piece by piece: each step of the iterator copies a page of a site and yields its bytes.

        No lane may name the pages before the last piece is copied and `has_arrived` returns True.
        """
        granted = {group: len(numbers) for group, numbers in pages.items() if numbers}
        assert granted == adapter.footprint.pages, f"granted {granted}, footprint {adapter.footprint.pages}"
        for site in self.sites:
            deltas = adapter.deltas.get(site.name, (None,) * len(site.slices))
            yield from self._writer.write(site, deltas, pages)
        self.version += 1

    def record_copies(self) -> CopyEvent:
        """Returns an event that comes after everything copied so far."""
        return self._staging.record() if self._staging else None

    @contextmanager
    def ordered_with_compute(self) -> Iterator[None]:
        """Orders the copies made inside after the work launched for computation so far, and ahead of later work."""
        if self._staging:
            self._staging.wait_for_compute()
        yield
        if self._staging:
            self._staging.make_compute_wait()

    def has_arrived(self, event: CopyEvent) -> bool:
        """Returns whether everything copied before `event` is in its pages."""
        return event is None or bool(event.query())  # type: ignore[no-untyped-call]

    def synchronize(self) -> None:
        """Waits until everything copied so far is in its pages."""
        event = self.record_copies()
        if event is not None:
            event.synchronize()

    def set_lane(self, lane: LanePages) -> None:
        """Sets the pages of lane `lane.lane`; a group that is not in `lane.pages` has no delta."""
        assert 1 <= lane.lane <= self.max_lanes, f"lane {lane.lane} of {self.max_lanes}"
        for group, pairs in lane.pages.items():
            count = self.page_counts.get(group, 0)
            assert all(0 <= page < count for page, _ in pairs), f"lane {lane.lane}: {group} has {count} pages"
        self.lanes[lane.lane] = {group: tuple(pairs) for group, pairs in lane.pages.items() if pairs}
        self.version += 1

    def any_lane_uses(self, lanes: Iterable[int], group: str) -> bool:
        """Returns whether any of these lanes has pages or vector slots of `group`."""
        vectors = vectors_of(group)
        return any(group in held or vectors in held for held in (self.lanes.get(lane, {}) for lane in lanes))

    def refresh_norms(self, lanes: Iterable[int]) -> bool:
        """Updates the table of norm weights. Returns whether an adapter of these lanes brings norm weights."""
        if self.norms is None:
            return False
        group = full_weights_of(NORMS)
        slots_by_lane = {lane: held[group] for lane, held in self.lanes.items() if group in held}
        self.norms.refresh(slots_by_lane, self.version)
        return any(lane in slots_by_lane for lane in lanes)

    def reset_lanes(self) -> None:
        """Removes every lane. The contents of the pages stay."""
        self.lanes.clear()
        self.version += 1

    def _create_pools(self, site: Site) -> None:
        counts, group = self.page_counts, site.group
        if counts.get(group, 0):
            self.pools[site.name] = SitePool.create(site, counts[group], self.dtype, self.device)
        if counts.get(vectors_of(group), 0):
            self.vectors[site.name] = VectorPool.create(site, counts[vectors_of(group)], self.device)
        if group != NORMS and counts.get(full_weights_of(group), 0):
            slots = counts[full_weights_of(group)]
            self.full_weights[site.name] = FullWeightPool.create(site, slots, self.extra_vocab, self.dtype, self.device)
