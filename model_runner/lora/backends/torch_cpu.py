"""Computes all lanes' deltas of a group in one call of the compiled delta kernel, directly from the pool.

    lane 4, pages 3 9   row 0, row 7         plan   2 lanes | 2 tokens 2 uses, 1 token 2 uses | 0 7  5 | 3 9  0 2
    lane 1, pages 0 2   row 5                scales                                                      1 1 .5 .5

Legend: q uses of pages by lanes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from model_runner.compute.kernels.cpu.functions.spec import TOLERANCE, KernelKey
from model_runner.compute.kernels.cpu.kernels import KernelSet
from model_runner.compute.kernels.cpu.lookup import KernelLookup
from model_runner.lora.backends.torch_bmm import LaneTokens
from model_runner.lora.pool.pages import RankPagePool
from model_runner.lora.site import Site
from model_runner.platform.device import dtype_name


@dataclass(frozen=True, eq=False)
class DeltaPlan:
    """The adapted tokens of a step in one group, and the pages of their lanes.

    plan        int64: the number of lanes, each lane's tokens and page uses, the tokens' rows, the pages
    scales_q    the scale of each use of a page, float32; `numbers` are the pages, sorted
    """

    plan: torch.Tensor
    scales_q: torch.Tensor
    numbers: tuple[int, ...]


def plan_delta(lanes: list[LaneTokens]) -> DeltaPlan:
    """Returns the plan for all tokens of `lanes`, in the order of the lanes."""
    counts = [count for lane in lanes for count in (len(lane.rows), len(lane.pairs))]
    numbers = [page for lane in lanes for page, _ in lane.pairs]
    plan = np.concatenate([np.array([len(lanes), *counts]), *(lane.rows for lane in lanes), np.array(numbers)])
    scales = np.array([scale for lane in lanes for _, scale in lane.pairs], dtype=np.float32)
    return DeltaPlan(torch.from_numpy(plan.astype(np.int64)), torch.from_numpy(scales), tuple(sorted(numbers)))


class DeltaKernel:
    """The compiled delta kernel, and the tensors that it reads for each site."""

    def __init__(self, pages: RankPagePool) -> None:
        self._pages = pages
        self._kernels = KernelLookup()
        linears = [site for site in pages.sites if site.name in pages.pools and not site.embeds]
        self._weights = {site.name: _weights(site, pages) for site in linears}
        self._groups = {site.group for site in linears}

    def use_kernels(self, kernels: KernelSet) -> None:
        """Looks the kernel up in `kernels` from now on."""
        self._kernels.use(kernels)

    def wanted_kernels(self, dtype: torch.dtype) -> list[KernelKey]:
        """Returns the key of the delta kernel, if adapters may touch a linear and compute in the model's dtype."""
        fits = self._weights and dtype is self._pages.dtype and dtype in TOLERANCE
        return [KernelKey("delta", dtype_name(dtype))] if fits else []

    def ready(self, group: str) -> bool:
        """Returns whether the kernel is compiled and can compute the deltas of `group`."""
        return group in self._groups and self._kernels.get("delta", self._pages.dtype) is not None

    def add(self, y_TO: torch.Tensor, x_TI: torch.Tensor, site: Site, tokens: DeltaPlan) -> None:
        """Adds the tokens' deltas to their rows of y, in place. The site's group must be ready."""
        kernel = self._kernels.get("delta", self._pages.dtype)
        assert kernel is not None
        kernel(y_TO, x_TI.contiguous(), *self._weights[site.name], tokens.plan, tokens.scales_q)


def _weights(site: Site, pages: RankPagePool) -> tuple[torch.Tensor, ...]:
    """Returns the site's pool, how many units its pages have, and its sizes: in, out, slices, where each slice ends."""
    pool, stops = pages.pools[site.name], [piece.stop for piece in site.slices]
    sizes = torch.tensor([site.in_features, site.out_features, len(stops), *stops])
    return pool.a_PSRI, pool.b_PRO, torch.from_numpy(pool.units_PS), sizes
