"""Writes an adapter's deltas into the pools of a site: a rank page, a vector slot or a part of a full weight at a time.

The parts of a page that an adapter does not use become zero, so nothing of its previous adapter remains. On CUDA a
piece is copied through the pinned buffers of `Staging`, elsewhere directly into the pool. Does not depend on lanes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from numpy.typing import NDArray

from model_runner.lora.normal_form import PAGE_RANK, Delta
from model_runner.lora.pool.norms import NormPool
from model_runner.lora.pool.site_pools import FullWeightPool, SitePool, VectorPool
from model_runner.lora.pool.staging import Staging
from model_runner.lora.site import NORMS, Site, full_weights_of, vectors_of

PIECE_BYTES = 4 << 20
"""Bytes of a full weight that are copied at a time."""

Deltas = Sequence[Delta | None]
"""An adapter's delta of each slice of a site."""


class PageWriter:
    """Copies adapters into the pools, which are keyed by site name."""

    def __init__(
        self,
        pools: Mapping[str, SitePool],
        vectors: Mapping[str, VectorPool],
        full_weights: Mapping[str, FullWeightPool],
        norms: NormPool | None,
        staging: Staging | None,
    ) -> None:
        self._pools, self._vectors, self._full_weights, self._norms = pools, vectors, full_weights, norms
        self._staging = staging

    def write(self, site: Site, deltas: Deltas, pages: Mapping[str, list[int]]) -> Iterator[int]:
        """Copies the deltas of one site into the granted pages and slots, and yields the bytes of each piece."""
        for order, page in enumerate(pages.get(site.group, ())):
            yield self._write_page(site, deltas, order, page)
        for slot in pages.get(vectors_of(site.group), ()):
            yield self._write_vectors(site, deltas, slot)
        for slot in pages.get(full_weights_of(site.group), ()):
            if site.group == NORMS:
                yield self._write_norm(site, deltas, slot)
            else:
                yield from self._write_full_weight(site, deltas, slot)

    def _write_page(self, site: Site, deltas: Deltas, order: int, page: int) -> int:
        """Writes the adapter's `order`-th 16 units at this site into `page`, and zeros. Returns the bytes written."""
        pool, first = self._pools[site.name], order * PAGE_RANK
        units_S = [0 if delta is None else max(0, min(PAGE_RANK, delta.rank - first)) for delta in deltas]
        a_SRI, b_RO = pool.a_PSRI[page], pool.b_PRO[page]
        with self._staged(a_SRI, b_RO) as (host_a, host_b):
            _write_units(host_a, host_b, site, deltas, units_S, first)
        pool.units_PS[page] = units_S
        return a_SRI.nbytes + b_RO.nbytes

    def _write_vectors(self, site: Site, deltas: Deltas, slot: int) -> int:
        """Writes the adapter's gains and biases at this site into `slot`, and zeros. Returns the bytes written."""
        pool = self._vectors[site.name]
        gain_O, bias_O = pool.gain_VO[slot], pool.bias_VO[slot]
        with self._staged(gain_O, bias_O) as (host_gain, host_bias):
            _write_gains_and_biases(host_gain, host_bias, site, deltas)
        pool.held_V[slot] = any(delta is not None and delta.has_vectors for delta in deltas)
        return gain_O.nbytes + bias_O.nbytes

    def _write_full_weight(self, site: Site, deltas: Deltas, slot: int) -> Iterator[int]:
        """Writes the adapter's full weight into `slot`, some rows at a time, and yields the bytes of each piece."""
        source, pool = _full_weight(deltas), self._full_weights[site.name]
        assert source is not None, f"a full-weight slot of {site.name} for an adapter without a full weight"
        assert len(source) <= pool.weight_SVH.shape[1], f"{len(source)} rows in a slot of {pool.weight_SVH.shape[1]}"
        pool.vocab_S[slot] = len(source)
        into = pool.weight(slot)
        rows = max(1, PIECE_BYTES // (into.shape[1] * into.itemsize))
        for begin in range(0, len(into), rows):
            part = into[begin : begin + rows]
            with self._staged(part, part[:0]) as (host, _):
                _raw(host)[...] = _raw(source[begin : begin + rows])
            yield part.nbytes

    def _write_norm(self, site: Site, deltas: Deltas, slot: int) -> int:
        """Writes the adapter's weight of this norm, or else the base's, into `slot`. Returns the bytes written."""
        assert self._norms is not None
        own_H, into_H = _full_weight(deltas), self._norms.slot(site, slot)
        source_H = self._norms.base(site) if own_H is None else own_H
        with self._staged(into_H, into_H[:0]) as (host, _):
            host.numpy()[...] = source_H.float().numpy()
        return into_H.nbytes

    def _staged(
        self, first: torch.Tensor, second: torch.Tensor
    ) -> AbstractContextManager[tuple[torch.Tensor, torch.Tensor]]:
        """Provides host tensors to write: pinned ones that are sent on leaving, or `first` and `second` themselves."""
        return nullcontext((first, second)) if self._staging is None else self._staging.into(first, second)


def _full_weight(deltas: Deltas) -> torch.Tensor | None:
    return next((delta.full_weight for delta in deltas if delta is not None and delta.full_weight is not None), None)


def _write_units(
    a_SRI: torch.Tensor, b_RO: torch.Tensor, site: Site, deltas: Deltas, units_S: list[int], first: int
) -> None:
    """Writes the units of every slice from unit `first` on, and zeros elsewhere.

    Uses numpy: torch spreads a copy over its threads and waits for the slowest of them, which costs milliseconds where
    the cores are busy.
    """
    raw_a, raw_b = _raw(a_SRI.transpose(1, 2) if site.embeds else a_SRI), _raw(b_RO)
    if min(units_S) < PAGE_RANK:
        raw_b[...] = 0
    for index, (piece, delta, units) in enumerate(zip(site.slices, deltas, units_S, strict=True)):
        raw_a[index, units:] = 0
        if delta is not None and units:
            raw_a[index, :units] = _raw(delta.a[first : first + units].to(a_SRI.dtype))
            raw_b[:units, piece.start : piece.stop] = _raw(delta.b[first : first + units].to(b_RO.dtype))


def _write_gains_and_biases(gain_O: torch.Tensor, bias_O: torch.Tensor, site: Site, deltas: Deltas) -> None:
    """Writes the gains minus one and the biases of every slice, and zeros elsewhere."""
    raw_gain, raw_bias = gain_O.numpy(), bias_O.numpy()
    raw_gain[...] = raw_bias[...] = 0
    for piece, delta in zip(site.slices, deltas, strict=True):
        if delta is not None and delta.gain is not None:
            raw_gain[piece.start : piece.stop] = delta.gain.numpy() - 1
        if delta is not None and delta.bias is not None:
            raw_bias[piece.start : piece.stop] = delta.bias.numpy()


def _raw(values: torch.Tensor) -> NDArray[Any]:
    """Returns the same memory as integers: numpy has no bfloat16, and copying does not need it."""
    raw: NDArray[Any] = values.view(torch.int16 if values.itemsize == 2 else torch.int32).numpy()
    return raw
