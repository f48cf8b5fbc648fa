"""LoRA in torch: the reference on any device, and with its compiled delta kernel the fast path on a CPU.

The plan of a step has, per group of sites, one part or a few:

    DeltaPlan    all lanes in one call of the compiled delta kernel, once it is compiled
    LaneBatch    until the kernel is compiled: batched matmuls over lanes with equally many pages and similar token
                 counts

A lane with a long prefill is a separate batch; gains, biases and the embedding always use LaneBatch. No lane affects a
row of another. Does not depend on adapters and formats. Legend: T tokens of the step, I in features, O out features.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from model_runner.compute.kernels.cpu.functions.spec import KernelKey
from model_runner.compute.kernels.cpu.kernels import KernelSet
from model_runner.config import ModelConfig
from model_runner.lora.backends.base import DEFAULTS, LoraBackend, Options
from model_runner.lora.backends.torch_bmm import LaneBatch, LaneTokens, add_delta, add_vectors, plan_lane_batch
from model_runner.lora.backends.torch_cpu import DeltaKernel, DeltaPlan, plan_delta
from model_runner.lora.pool.pages import RankPagePool
from model_runner.lora.site import Site, Slice, vectors_of
from model_runner.step.layout import Layout

SHARED_TOKENS = (4, 16, 64)
"""Bounds of a lane's tokens in a step. Lanes between the same bounds share a LaneBatch; a longer lane has its own."""

MAX_TOUCHED = 1 << 14
"""The most entries of the cache of touched slices (by site and pages). The cache is cleared when it holds more."""

TorchLoraMetadata = dict[str, list[LaneBatch | DeltaPlan]]


class TorchLora(LoraBackend):
    """Adds each part's vectors and deltas to its rows of y. Rows of lane 0 are never changed."""

    def __init__(self, pages: RankPagePool, options: Options = DEFAULTS) -> None:
        super().__init__(pages, options)
        self._version = pages.version
        self._touched: dict[tuple[str, tuple[int, ...]], list[tuple[int, Slice]]] = {}
        self._deltas = DeltaKernel(pages)

    def use_kernels(self, kernels: KernelSet) -> None:
        self._deltas.use_kernels(kernels)

    def wanted_kernels(self, config: ModelConfig, dtype: torch.dtype) -> list[KernelKey]:
        return self._deltas.wanted_kernels(dtype)

    def plan(self, layout: Layout, into: Any | None = None) -> TorchLoraMetadata | None:
        """Returns the step's parts by group, or None when no chunk has a delta."""
        if not layout.lanes_C.any():
            return None
        if self._version != self.pages.version or len(self._touched) > MAX_TOUCHED:
            self._version = self.pages.version
            self._touched.clear()
        lanes_T = np.repeat(layout.lanes_C, layout.lengths_C)
        rows = {int(lane): np.flatnonzero(lanes_T == lane) for lane in np.unique(lanes_T) if lane}
        meta = {group: self._plan_group(group, rows) for group, count in self.pages.page_counts.items() if count}
        return {group: parts for group, parts in meta.items() if parts} or None

    def adapt(self, y_TO: torch.Tensor, x: torch.Tensor, site: Site, meta: TorchLoraMetadata) -> None:
        """Adds gains and biases, then the deltas, because a gain multiplies only the base's output."""
        for batch in meta.get(vectors_of(site.group), ()):
            assert isinstance(batch, LaneBatch)
            pool = self.pages.vectors[site.name]
            if pool.held_V[list(batch.numbers)].any():
                add_vectors(y_TO, site, pool, batch)
        for part in meta.get(site.group, ()):
            touched = self._touched_slices(site, part)
            if not touched:
                continue
            if isinstance(part, DeltaPlan):
                self._deltas.add(y_TO, x, site, part)
            else:
                add_delta(y_TO, x, site, self.pages.pools[site.name], touched, part)

    def _plan_group(self, group: str, rows: dict[int, NDArray[np.int64]]) -> list[LaneBatch | DeltaPlan]:
        held = {lane: [pair for pair in self.pages.lanes[lane].get(group, ()) if pair[1]] for lane in rows}
        lanes = {lane: LaneTokens(rows[lane], pairs) for lane, pairs in held.items() if pairs}
        if lanes and self._deltas.ready(group):
            return [plan_delta(list(lanes.values()))]
        shared: dict[tuple[int, int], list[LaneTokens]] = {}
        for lane, tokens in lanes.items():
            shared.setdefault((_bound(lane, len(tokens.rows)), len(tokens.pairs)), []).append(tokens)
        return [plan_lane_batch(together, self.pages.device) for together in shared.values()]

    def _touched_slices(self, site: Site, part: LaneBatch | DeltaPlan) -> list[tuple[int, Slice]]:
        """Returns the slices of the site in which any of the part's pages has units."""
        key = (site.name, part.numbers)
        if key not in self._touched:
            units_S = self.pages.pools[site.name].units_PS[list(part.numbers)].max(axis=0).tolist()
            self._touched[key] = [(index, piece) for index, piece in enumerate(site.slices) if units_S[index]]
        return self._touched[key]


def _bound(lane: int, tokens: int) -> int:
    """Returns the smallest of SHARED_TOKENS that holds `tokens`, else -lane. Lanes of equal bound share a LaneBatch."""
    return next((bound for bound in SHARED_TOKENS if tokens <= bound), -lane)
