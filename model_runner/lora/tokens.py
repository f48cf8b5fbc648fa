"""Tokens: how the compiled delta computes some lanes' deltas, each token by itself, straight from the pool.

    lane 4, pages 3 9   row 0, row 7         rows_n [0 7 5]     pages_nk 3 9     scales_nk  1  1
    lane 1, pages 0 2   row 5                                            3 9                1  1
                                                                         0 2               .5 .5

Knows nothing of how the delta is compiled, nor of the lanes that have none of it. Legend: T tokens of the step, n of
them that are adapted, k pages of each, L lanes, I in features, O out features.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from model_runner.compiled.found import Found
from model_runner.compiled.kernels import Kernels
from model_runner.compiled.program import Function, Kernel
from model_runner.device import dtype_name
from model_runner.lora.pages import RankPages
from model_runner.lora.reads import LaneTokens
from model_runner.lora.site import Site

FEW = 32
"""Lanes of at most so many tokens in a step go through the compiled delta, where there is one; beyond, matmuls win."""

WIDE = 4096
"""From so many columns on, a lone token's are computed in two parts at once: gate and up of a cold page take 30 us
instead of 45. A lone token's fewer columns are done before a second thread has heard of them.
"""


@dataclass(frozen=True, eq=False)
class Tokens:
    """Tokens of lanes that hold equally many pages, for the compiled delta: each for itself.

    rows_n      where they are in the batch
    pages_nk    their lanes' pages; `numbers` are those of all these lanes
    scales_nk   the pages' scales, float32
    """

    rows_n: torch.Tensor
    pages_nk: torch.Tensor
    scales_nk: torch.Tensor
    numbers: tuple[int, ...]


def plan_tokens(lanes: list[LaneTokens]) -> Tokens:
    """Every token of lanes that hold equally many pages, with its lane's pages and scales."""
    counts = [len(lane.rows) for lane in lanes]
    pairs_nk2 = np.array([lane.pairs for lane in lanes], dtype=np.float64).repeat(counts, axis=0)
    return Tokens(
        rows_n=torch.from_numpy(np.concatenate([lane.rows for lane in lanes])),
        pages_nk=torch.from_numpy(pairs_nk2[..., 0].astype(np.int64)),
        scales_nk=torch.from_numpy(pairs_nk2[..., 1].astype(np.float32)),
        numbers=tuple(sorted(page for lane in lanes for page, _ in lane.pairs)),
    )


class Deltas:
    """The compiled deltas of the sites: one for several tokens, one for a lone one."""

    def __init__(self, pages: RankPages) -> None:
        self._pages = pages
        self._found = Found()
        self._kernels: dict[str, list[Kernel]] = {}
        self._groups: set[str] = set()  # all of whose deltas are there

    def use(self, kernels: Kernels) -> None:
        """Where they are to be found, once they are compiled."""
        self._found.use(kernels)

    def functions(self, dtype: torch.dtype) -> list[Function]:
        """The delta of each shape of linear that adapters may touch, if they compute in the model's dtype."""
        if self._pages.dtype is not dtype:
            return []
        sites = [site for site in self._pages.sites if site.name in self._pages.pools and not site.embeds]
        return list(dict.fromkeys(function for site in sites for function in _functions(site, dtype)))

    def ready(self, group: str) -> bool:
        """Whether the delta of every site of the group is compiled by now."""
        if group not in self._groups:
            sites = [site for site in self._pages.sites if site.group == group and site.name in self._pages.pools]
            found = {
                site.name: [self._found.look(function) for function in _functions(site, self._pages.dtype)]
                for site in sites
            }
            if not found or any(kernel is None for kernels in found.values() for kernel in kernels):
                return False
            self._kernels |= {name: [kernel for kernel in kernels if kernel] for name, kernels in found.items()}
            self._groups.add(group)
        return True

    def add(self, y_TO: torch.Tensor, x_TI: torch.Tensor, site: Site, tokens: Tokens) -> None:
        """Adds each token's delta to its row of y, in place. The site's group is ready."""
        pool, weights = self._pages.pools[site.name], (tokens.rows_n, tokens.pages_nk, tokens.scales_nk)
        many, lone = self._kernels[site.name]
        kernel = lone if len(tokens.rows_n) == 1 else many
        kernel([y_TO, x_TI.contiguous(), pool.a_PSRI, pool.b_PRO, *weights])


def _functions(site: Site, dtype: torch.dtype) -> list[Function]:
    """The delta for several tokens, and that for a lone one."""
    name, stops = dtype_name(dtype), [piece.stop for piece in site.slices]
    blocks, threads = (2, 0) if site.out_features >= WIDE else (1, 1)
    many = Function("delta", (1, site.in_features, *stops), name)
    return [many, Function("delta", (blocks, site.in_features, *stops), name, threads=threads)]
