"""Norm weights of adapters: the contents of their slots, and the table of weights by lane."""

from __future__ import annotations

import pytest
import torch

from engine.messages import Footprint, LanePages
from model_runner.lora.normal_form import Delta, NormalForm, footprint
from model_runner.lora.pool.norms import NormPool
from model_runner.lora.pool.pages import RankPagePool
from model_runner.lora.pool.site_pools import page_bytes
from model_runner.lora.site import NORMS, Site, Slice, full_weights_of
from model_runner.quantization.plain import Plain

CPU = torch.device("cpu")
FULL = full_weights_of(NORMS)


def norm(name: str, size: int, seed: int) -> Site:
    weight = torch.randn(size, generator=torch.Generator().manual_seed(seed)).bfloat16()
    return Site(f"layers.0.{name}", "model.layers.0", 0, NORMS, (Slice(name, 0, size),), Plain(weight))


SITES = [norm("input_layernorm", 24, 1), norm("q_norm", 8, 2), norm("k_norm", 8, 3)]


def adapter(seed: int, *names: str) -> NormalForm:
    draw = torch.Generator().manual_seed(seed)
    deltas = {}
    for site in SITES:
        if site.slices[0].module in names:
            size = site.out_features
            whole = torch.randn(size, generator=draw).bfloat16()
            deltas[site.name] = (Delta(torch.empty(0, 0), torch.empty(0, size), full_weight=whole),)
    sites = {site.name: site for site in SITES}
    return NormalForm(seed, str(seed), str(seed), 0, list(names), footprint(deltas, sites), deltas, 0)


@pytest.fixture
def pages() -> RankPagePool:
    made = RankPagePool(SITES, {FULL: 3}, 4, torch.bfloat16, CPU)
    assert made.pools == made.vectors == made.full_weights == {}
    return made


def table(pages: RankPagePool, number: int) -> torch.Tensor:
    assert isinstance(pages.norms, NormPool)
    return pages.norms.table(SITES[number])


def own(one: NormalForm, number: int) -> torch.Tensor:
    (delta,) = one.deltas[SITES[number].name]
    assert delta is not None
    assert delta.full_weight is not None
    return delta.full_weight


def test_norms_an_adapter_lacks_are_the_bases(pages: RankPagePool) -> None:
    one = adapter(5, "input_layernorm", "k_norm")
    assert one.footprint == Footprint(pages={FULL: 1})
    assert page_bytes(SITES, torch.bfloat16) == {FULL: 4 * 40}
    pages.fill(one, {FULL: [2]})
    pages.set_lane(LanePages(3, {FULL: [(2, 1.0)]}))
    assert pages.refresh_norms([0, 3])
    assert not pages.refresh_norms([0, 1])
    assert torch.equal(table(pages, 0)[3], own(one, 0))
    assert torch.equal(table(pages, 1)[3], SITES[1].base.weight)
    assert torch.equal(table(pages, 2)[3], own(one, 2))
    for number, site in enumerate(SITES):
        assert torch.equal(table(pages, number)[[0, 1, 2, 4]], site.base.weight.expand(4, -1))


def test_lane_given_to_another_adapter_has_its_norms(pages: RankPagePool) -> None:
    pages.fill(adapter(5, "q_norm"), {FULL: [0]})
    pages.set_lane(LanePages(1, {FULL: [(0, 1.0)]}))
    assert pages.refresh_norms([1])
    other = adapter(6, "input_layernorm")
    pages.fill(other, {FULL: [0]})  # the lane refers to the same slot as before
    assert pages.refresh_norms([1])
    assert torch.equal(table(pages, 0)[1], own(other, 0))
    assert torch.equal(table(pages, 1)[1], SITES[1].base.weight)
    pages.set_lane(LanePages(1, {}))
    assert not pages.refresh_norms([1])
    assert torch.equal(table(pages, 0)[1], SITES[0].base.weight)
    pages.set_lane(LanePages(2, {FULL: [(0, 1.0)]}))
    pages.refresh_norms([2])
    pages.reset_lanes()
    assert not pages.refresh_norms([2])
    assert torch.equal(table(pages, 0)[2], SITES[0].base.weight)


def test_mix_adds_the_scaled_changes_of_its_adapters(pages: RankPagePool) -> None:
    one, two = adapter(5, "q_norm"), adapter(6, "q_norm", "k_norm")
    pages.fill(one, {FULL: [1]})
    pages.fill(two, {FULL: [0]})
    pages.set_lane(LanePages(4, {FULL: [(1, 0.5), (0, -0.25)]}))
    assert pages.refresh_norms([4])
    base = SITES[1].base.weight.float()
    mixed = base + 0.5 * (own(one, 1).float() - base) - 0.25 * (own(two, 1).float() - base)
    assert torch.equal(table(pages, 1)[4], mixed.bfloat16())
    base = SITES[2].base.weight.float()
    assert torch.equal(table(pages, 2)[4], (base - 0.25 * (own(two, 2).float() - base)).bfloat16())


def test_pool_without_slots_has_no_table() -> None:
    pages = RankPagePool(SITES, {}, 4, torch.bfloat16, CPU)
    assert pages.norms is None
    assert not pages.refresh_norms([0])
    assert pages.bytes == 0
