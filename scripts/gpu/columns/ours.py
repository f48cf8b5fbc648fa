"""Our LoRA backends as columns, run as in the server: filled pages, lanes, a planned step, `adapt`."""

from __future__ import annotations

import numpy as np
import torch
from gpu.case import Case, Run

from engine.messages import LanePages
from model_runner.lora.backends import base
from model_runner.lora.normal_form import PAGE_RANK
from model_runner.lora.pool.pages import RankPagePool
from model_runner.lora.site import Site, Slice
from model_runner.quantization.plain import Plain
from model_runner.step.layout import Layout


def run(name: str, case: Case) -> Run:
    """Prepares the backend called `name` over rank pages with the case's adapters; decodes use static buffers."""
    pages, sites = _pages(case)
    backend = base.create(name, pages)
    layout = _layout(case)
    meta = backend.plan(layout, backend.static(case.point.tokens) if case.point.decodes else None)

    def compute(copy: int) -> torch.Tensor:
        y_TO = sites[copy].base.apply(case.x_TI)
        backend.adapt(y_TO, case.x_TI, sites[copy], meta)
        return y_TO

    return compute


def _pages(case: Case) -> tuple[RankPagePool, list[Site]]:
    """Returns the filled pages and a site for each copy; each adapter has a lane with consecutive pages."""
    site, stops = case.site, case.offsets
    slices = tuple(Slice(f"m{i}", stops[i], stops[i + 1]) for i in range(len(site.slices)))
    sites = [
        Site(f"{site.name}.{copy}", "", copy, site.name, slices, Plain(case.bases[copy % len(case.bases)]))
        for copy in range(len(case.copies))
    ]
    counts = [-(-rank // PAGE_RANK) for rank in case.point.ranks]
    firsts = [sum(counts[:lane]) for lane in range(len(counts))]
    pages = RankPagePool(sites, {site.name: sum(counts)}, case.point.lanes, case.x_TI.dtype, case.device)
    for copy, adapters in enumerate(case.copies):
        for lane, (a_slices, b_Or) in enumerate(adapters):
            _fill(pages, sites[copy], firsts[lane], a_slices, b_Or)
    for lane, (first, count) in enumerate(zip(firsts, counts, strict=True), 1):
        pages.set_lane(LanePages(lane, {site.name: [(page, 1.0) for page in range(first, first + count)]}))
    return pages, sites


def _fill(pages: RankPagePool, site: Site, first: int, a_slices: list[torch.Tensor], b_Or: torch.Tensor) -> None:
    pool, rank = pages.pools[site.name], b_Or.shape[1]
    for order in range(-(-rank // PAGE_RANK)):
        units = slice(order * PAGE_RANK, min(rank, (order + 1) * PAGE_RANK))
        count, page = units.stop - units.start, first + order
        for index, a_rI in enumerate(a_slices):
            pool.a_PSRI[page, index, :count] = a_rI[units]
        pool.b_PRO[page, :count] = b_Or[:, units].T
        pool.units_PS[page] = count
    pages.version += 1


def _layout(case: Case) -> Layout:
    """Returns the layout: one chunk for each token of decodes, one for each lane of prefills."""
    lanes_T = np.array(case.point.lane_of_token, np.int32) + 1
    lanes_C = lanes_T if case.point.decodes else np.unique(lanes_T)
    lengths_C = np.ones_like(lanes_C) if case.point.decodes else np.bincount(lanes_T)[1:].astype(np.int32)
    nothing_C = np.zeros_like(lanes_C)
    return Layout(nothing_C, nothing_C, lengths_C, lanes_C, np.zeros((1, 1), np.int32), 16)
