"""Rank pages: the LoRA pools of all sites, filled page by page, and the table of lanes over them.

    pool of a site of group g     A [P, slices, 16, in]     B [P, 16, out]     units [P, slices]
    the embedding's               A [P, 1, vocabulary, 16]  B [P, 16, out]     a token's 16 units lie together
    vectors, group "g.vectors"    gain less one [V, out]    bias [V, out]      float32, one slot an adapter
    whole, group "g.full"         [slots, vocabulary + extra, ...]             embedding and head, one slot an adapter
    norms, group "norms.full"     [slots, all norms]                           float32, one slot an adapter (lora.norms)

Page p of a group means the same 16 units of rank at every site of that group. A page's unused units are zero, and so
are its sites that the adapter leaves alone: what was in a page before never shows. A group of vector slots is a group
like any other for whoever grants pages. Knows nothing of steps; the scheduler decides which page is whose.
Legend: P pages of the group, V vector slots, I in features, O out features.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from engine.messages import LanePages
from model_runner.lora.normal_form import PAGE_RANK, Delta, NormalForm
from model_runner.lora.pool.norms import NormPool
from model_runner.lora.pool.staging import Staging
from model_runner.lora.site import NORMS, Site, full_weights_of, vectors_of

Lane = Mapping[str, Sequence[tuple[int, float]]]
"""Per group: (rank page or vector slot, scale) pairs."""

Mark = torch.cuda.Event | None
"""A point in the stream of copies; None: copies are done at once."""

PIECE_BYTES = 4 << 20
"""Of a whole matrix, copied at a time."""


def page_bytes(sites: Iterable[Site], dtype: torch.dtype, extra_vocab: int = 0) -> dict[str, int]:
    """Bytes of one rank page of each group, of one vector slot, and of one matrix slot, which has room for
    `extra_vocab` more tokens than the base.
    """
    sizes: dict[str, int] = {}
    for site in sites:
        if site.group == NORMS:
            whole = full_weights_of(NORMS)
            sizes[whole] = sizes.get(whole, 0) + site.out_features * torch.float32.itemsize
            continue
        columns, vectors = len(site.slices) * site.in_features + site.out_features, vectors_of(site.group)
        sizes[site.group] = sizes.get(site.group, 0) + PAGE_RANK * columns * dtype.itemsize
        sizes[vectors] = sizes.get(vectors, 0) + 2 * site.out_features * torch.float32.itemsize
        if site.replaceable:
            rows = site.vocabulary + extra_vocab
            sizes[full_weights_of(site.group)] = rows * site.base.shape[1] * dtype.itemsize
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


@dataclass(frozen=True, eq=False)
class VectorPool:
    """The vector slots of one site, as float32. `held_V` says whether a slot holds anything here.

    y += scale * (gain_less_one * (x W^T) + bias), where x W^T is without the base's bias.
    """

    gain_VO: torch.Tensor
    bias_VO: torch.Tensor
    held_V: NDArray[np.bool_]

    @property
    def bytes(self) -> int:
        """Bytes of both tensors."""
        return self.gain_VO.nbytes + self.bias_VO.nbytes


@dataclass(frozen=True, eq=False)
class FullWeightPool:
    """The matrix slots of one site. `vocab_S` says how many rows of a slot are real: its adapter's vocabulary."""

    weight_SVH: torch.Tensor
    vocab_S: NDArray[np.int64]

    def matrix(self, slot: int) -> torch.Tensor:
        """The matrix in a slot."""
        return self.weight_SVH[slot, : int(self.vocab_S[slot])]


class RankPagePool:
    """The pools by site name, and the lanes. `pages` says how many pages each group has; without any, no pool.

    Whole matrices may have `extra_vocab` rows more than the base's.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        pages: dict[str, int],
        max_lanes: int,
        dtype: torch.dtype,
        device: torch.device,
        extra_vocab: int = 0,
    ) -> None:
        self.sites = list(sites)
        self.extra_vocab = extra_vocab
        self.page_counts = dict(pages)
        self.max_lanes = max_lanes
        self.dtype = dtype
        self.device = device
        self.version = 0
        self.lanes: dict[int, Lane] = {}
        self.pools = {site.name: self._pool(site) for site in sites if pages.get(site.group, 0)}
        self.vectors = {site.name: self._vectors(site) for site in sites if pages.get(vectors_of(site.group), 0)}
        whole = [site for site in sites if site.group != NORMS and pages.get(full_weights_of(site.group), 0)]
        self.full_weights = {site.name: self._whole(site) for site in whole}
        slots = pages.get(full_weights_of(NORMS), 0)
        self.norms = NormPool(sites, slots, max_lanes, device) if slots else None
        self._staging = Staging(device) if device.type == "cuda" else None

    @property
    def bytes(self) -> int:
        """Bytes of all pools."""
        pools = [pool.bytes for pool in self.pools.values()] + [pool.bytes for pool in self.vectors.values()]
        norms = self.norms.bytes if self.norms else 0
        return sum(pools) + sum(pool.weight_SVH.nbytes for pool in self.full_weights.values()) + norms

    def fill(self, adapter: NormalForm, pages: dict[str, list[int]]) -> None:
        """Copies the adapter into these pages, by group, as many as its footprint says; nothing else changes."""
        for _ in self.pieces(adapter, pages):
            pass
        self.synchronize()

    def pieces(self, adapter: NormalForm, pages: dict[str, list[int]]) -> Iterator[int]:
        """The same a page of a site at a time: each step of the iterator copies one and yields its bytes.

        No lane may name the pages before the last one was copied and `arrived` says so.
        """
        granted = {group: len(numbers) for group, numbers in pages.items() if numbers}
        assert granted == adapter.footprint.pages, f"granted {granted}, footprint {adapter.footprint.pages}"
        for site in self.sites:
            deltas = adapter.deltas.get(site.name, (None,) * len(site.slices))
            for order, page in enumerate(pages.get(site.group, ())):
                yield self._fill_page(site, deltas, order, page)
            for slot in pages.get(vectors_of(site.group), ()):
                yield self._fill_vectors(site, deltas, slot)
            for slot in pages.get(full_weights_of(site.group), ()):
                yield from (
                    self._fill_norm(site, deltas, slot) if site.group == NORMS else self._fill_whole(site, deltas, slot)
                )
        self.version += 1

    def mark(self) -> Mark:
        """A point after all that was copied so far."""
        return self._staging.mark() if self._staging else None

    @contextmanager
    def in_line(self) -> Iterator[None]:
        """What is copied inside comes after all that the device was given so far, and before all that it will be."""
        if self._staging:
            self._staging.follow()
        yield
        if self._staging:
            self._staging.lead()

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
            count = self.page_counts.get(group, 0)
            assert all(0 <= page < count for page, _ in pairs), f"lane {lane.lane}: {group} has {count} pages"
        self.lanes[lane.lane] = {group: tuple(pairs) for group, pairs in lane.pages.items() if pairs}
        self.version += 1

    def touch(self, lanes: Iterable[int], group: str) -> bool:
        """Whether any of these lanes changes the sites of `group`."""
        return any(group in held or vectors_of(group) in held for held in (self.lanes.get(lane, {}) for lane in lanes))

    def own_norms(self, lanes: Iterable[int]) -> bool:
        """Whether any of these lanes has norms of its own; from then on the table says what each is normed with."""
        if self.norms is None:
            return False
        having = {
            lane: held[full_weights_of(NORMS)] for lane, held in self.lanes.items() if full_weights_of(NORMS) in held
        }
        self.norms.refresh(having, self.version)
        return any(lane in having for lane in lanes)

    def reset_lanes(self) -> None:
        """Forgets every lane; the pages keep what they hold."""
        self.lanes.clear()
        self.version += 1

    def _pool(self, site: Site) -> SitePool:
        count, slices = self.page_counts[site.group], len(site.slices)
        units = (site.in_features, PAGE_RANK) if site.embeds else (PAGE_RANK, site.in_features)
        return SitePool(
            torch.zeros(count, slices, *units, dtype=self.dtype, device=self.device),
            torch.zeros(count, PAGE_RANK, site.out_features, dtype=self.dtype, device=self.device),
            np.zeros((count, slices), dtype=np.int32),
        )

    def _vectors(self, site: Site) -> VectorPool:
        count = self.page_counts[vectors_of(site.group)]
        gain, bias = (torch.zeros(count, site.out_features, dtype=torch.float32, device=self.device) for _ in range(2))
        return VectorPool(gain, bias, np.zeros(count, dtype=np.bool_))

    def _whole(self, site: Site) -> FullWeightPool:
        count, rows = self.page_counts[full_weights_of(site.group)], site.vocabulary + self.extra_vocab
        weight_SVH = torch.zeros(count, rows, site.base.shape[1], dtype=self.dtype, device=self.device)
        return FullWeightPool(weight_SVH, np.full(count, site.vocabulary))

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

    def _fill_vectors(self, site: Site, deltas: Sequence[Delta | None], slot: int) -> int:
        """The adapter's gains and biases at this site go into `slot`; columns without any become zero."""
        pool = self.vectors[site.name]
        gain_O, bias_O = pool.gain_VO[slot], pool.bias_VO[slot]
        if self._staging is None:
            _write_vectors(gain_O, bias_O, site, deltas)
        else:
            with self._staging.into(gain_O, bias_O) as (staged_gain, staged_bias):
                _write_vectors(staged_gain, staged_bias, site, deltas)
        pool.held_V[slot] = any(delta is not None and delta.has_vectors for delta in deltas)
        return gain_O.nbytes + bias_O.nbytes

    def _fill_whole(self, site: Site, deltas: Sequence[Delta | None], slot: int) -> Iterator[int]:
        """The adapter's own matrix goes into `slot`, some rows at a time."""
        (source,) = [delta.full_weight for delta in deltas if delta is not None and delta.full_weight is not None]
        pool = self.full_weights[site.name]
        assert len(source) <= pool.weight_SVH.shape[1], f"{len(source)} rows in a slot of {pool.weight_SVH.shape[1]}"
        pool.vocab_S[slot] = len(source)
        into = pool.matrix(slot)
        rows = max(1, PIECE_BYTES // (into.shape[1] * into.itemsize))
        for begin in range(0, len(into), rows):
            part, given = into[begin : begin + rows], source[begin : begin + rows]
            if self._staging is None:
                _raw(part)[...] = _raw(given)
            else:
                with self._staging.into(part, part[:0]) as (staged, _):
                    _raw(staged)[...] = _raw(given)
            yield part.nbytes

    def _fill_norm(self, site: Site, deltas: Sequence[Delta | None], slot: int) -> Iterator[int]:
        """The adapter's weight of this norm, or the base's, goes into `slot`."""
        assert self.norms is not None
        own = [delta.full_weight for delta in deltas if delta is not None and delta.full_weight is not None]
        source_H, into_H = (own or [self.norms.base(site)])[0], self.norms.slot(site, slot)
        if self._staging is None:
            into_H.numpy()[...] = source_H.float().numpy()
        else:
            with self._staging.into(into_H, into_H[:0]) as (staged, _):
                staged.numpy()[...] = source_H.float().numpy()
        yield into_H.nbytes


def _write(
    a_SRI: torch.Tensor, b_RO: torch.Tensor, site: Site, deltas: Sequence[Delta | None], units_S: list[int], first: int
) -> None:
    """The units from `first` on of every slice, and zeros.

    By numpy: a copy that torch spreads over its threads waits for the slowest of them, which costs milliseconds where
    the cores are taken.
    """
    raw_a, raw_b = _raw(a_SRI.transpose(1, 2) if site.embeds else a_SRI), _raw(b_RO)
    if min(units_S) < PAGE_RANK:
        raw_b[...] = 0
    for index, (piece, delta, units) in enumerate(zip(site.slices, deltas, units_S, strict=True)):
        raw_a[index, units:] = 0
        if delta is not None and units:
            raw_a[index, :units] = _raw(delta.a[first : first + units].to(a_SRI.dtype))
            raw_b[:units, piece.start : piece.stop] = _raw(delta.b[first : first + units].to(b_RO.dtype))


def _write_vectors(gain_O: torch.Tensor, bias_O: torch.Tensor, site: Site, deltas: Sequence[Delta | None]) -> None:
    """Gains less one and biases of every slice, and zeros."""
    raw_gain, raw_bias = gain_O.numpy(), bias_O.numpy()
    raw_gain[...] = raw_bias[...] = 0
    for piece, delta in zip(site.slices, deltas, strict=True):
        if delta is not None and delta.gain is not None:
            raw_gain[piece.start : piece.stop] = delta.gain.numpy() - 1
        if delta is not None and delta.bias is not None:
            raw_bias[piece.start : piece.stop] = delta.bias.numpy()


def _raw(values: torch.Tensor) -> NDArray[Any]:
    """The same memory as integers: numpy knows no bfloat16, and a copy need not."""
    raw: NDArray[Any] = values.view(torch.int16 if values.itemsize == 2 else torch.int32).numpy()
    return raw
