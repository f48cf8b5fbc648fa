"""Rank pages: what a fill writes and clears, and how lanes refer to pages."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from fixtures.adapters.lora_sites import random_adapter, random_sites

from engine.messages import Footprint, LanePages
from model_runner.lora.normal_form import PAGE_RANK, Delta, NormalForm, footprint
from model_runner.lora.pool.pages import RankPagePool
from model_runner.lora.pool.site_pools import page_bytes
from model_runner.lora.site import EMBED, Site, Slice, vectors_of
from model_runner.quantization.plain import Plain

SITES = random_sites()
CPU = torch.device("cpu")


GROUPS = ("qkv", "o", "gate_up", "down")


def pages(count: int = 6) -> RankPagePool:
    groups = [*GROUPS, *map(vectors_of, GROUPS)]
    return RankPagePool(SITES, dict.fromkeys(groups, count), 4, torch.float32, CPU)


def units(adapter: NormalForm, site: Site, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    delta = adapter.deltas[site.name][index]
    assert delta is not None
    return delta.a, delta.b


def test_page_bytes_are_the_bytes_of_the_pools() -> None:
    sizes = page_bytes(SITES, torch.float32)
    assert sizes["qkv"] == 2 * 4 * PAGE_RANK * (3 * 24 + 48)
    assert pages(1).bytes == sum(sizes.values())
    assert pages(5).bytes == 5 * sum(sizes.values())
    assert sizes["qkv.vectors"] == 2 * 2 * 4 * 48
    half = page_bytes(SITES, torch.bfloat16)
    assert half == {group: size if group.endswith(".vectors") else size // 2 for group, size in sizes.items()}


def test_fill_spreads_units_over_scattered_pages() -> None:
    adapter = random_adapter(SITES, 1, {"q_proj": 35, "v_proj": 4, "down_proj": 16})
    assert adapter.footprint == Footprint(pages={"qkv": 3, "down": 1})
    pool = pages()
    pool.fill(adapter, {"qkv": [4, 0, 2], "down": [5]})
    site = SITES[0]
    held = pool.pools[site.name]
    a, b = units(adapter, site, 0)
    assert torch.equal(held.a_PSRI[4, 0], a[:16])
    assert torch.equal(held.a_PSRI[0, 0], a[16:32])
    assert torch.equal(held.a_PSRI[2, 0, :3], a[32:])
    assert torch.equal(held.b_PRO[2, :3, :32], b[32:])
    a, b = units(adapter, site, 2)
    assert torch.equal(held.a_PSRI[4, 2, :4], a)
    assert torch.equal(held.b_PRO[4, :4, 40:], b)
    assert held.units_PS.tolist() == [[16, 0, 0], [0, 0, 0], [3, 0, 0], [0, 0, 0], [16, 0, 4], [0, 0, 0]]
    for page in (1, 3, 5):
        assert not held.a_PSRI[page].any()
        assert not held.b_PRO[page].any()


def test_refilled_page_holds_nothing_of_the_last_adapter() -> None:
    old = random_adapter(SITES, 1, {"q_proj": 16, "k_proj": 16, "v_proj": 16, "down_proj": 16})
    new = random_adapter(SITES, 2, {"q_proj": 3}, layers={1})
    reused, fresh = pages(2), pages(2)
    reused.fill(old, {"qkv": [1], "down": [1]})
    reused.fill(new, {"qkv": [1]})
    fresh.fill(new, {"qkv": [1]})
    for site in SITES:
        if site.group == "qkv":
            ours, theirs = reused.pools[site.name], fresh.pools[site.name]
            assert torch.equal(ours.a_PSRI, theirs.a_PSRI)
            assert torch.equal(ours.b_PRO, theirs.b_PRO)
            assert ours.units_PS.tolist() == theirs.units_PS.tolist()


def test_fill_writes_its_own_pages_only() -> None:
    pool = pages(3)
    pool.fill(random_adapter(SITES, 1, {"o_proj": 16}), {"o": [1]})
    before = {name: (held.a_PSRI.clone(), held.b_PRO.clone()) for name, held in pool.pools.items()}
    pool.fill(random_adapter(SITES, 2, {"o_proj": 20}), {"o": [2, 0]})
    for name, (a, b) in before.items():
        assert torch.equal(pool.pools[name].a_PSRI[1], a[1])
        assert torch.equal(pool.pools[name].b_PRO[1], b[1])


def test_grant_other_than_the_footprint_is_an_assertion() -> None:
    adapter = random_adapter(SITES, 1, {"q_proj": 17})
    for granted in ({"qkv": [0]}, {"qkv": [0, 1, 2]}, {"qkv": [0, 1], "o": [0]}, {}):
        with pytest.raises(AssertionError, match="footprint"):
            pages().fill(adapter, granted)


def test_vector_slot_holds_gains_and_biases() -> None:
    adapter = random_adapter(SITES, 1, {"q_proj": 4, "v_proj": 4})
    gain, bias = torch.rand(32), torch.rand(8)
    deltas = dict(adapter.deltas)
    q, _, v = deltas["layers.1.qkv"]
    assert q is not None
    assert v is not None
    deltas["layers.1.qkv"] = (replace(q, gain=gain), None, replace(v, bias=bias))
    held = footprint(deltas, {site.name: site for site in SITES})
    assert held == Footprint(pages={"qkv": 1, "qkv.vectors": 1})
    pool = pages(3)
    pool.fill(replace(adapter, deltas=deltas, footprint=held), {"qkv": [2], "qkv.vectors": [1]})
    here, elsewhere = pool.vectors["layers.1.qkv"], pool.vectors["layers.0.qkv"]
    assert (here.held_V.tolist(), elsewhere.held_V.tolist()) == ([False, True, False], [False] * 3)
    assert torch.equal(here.gain_VO[1], torch.cat([gain - 1, torch.zeros(16)]))
    assert torch.equal(here.bias_VO[1], torch.cat([torch.zeros(40), bias]))
    other = dict(deltas) | {"layers.1.qkv": (None, Delta(torch.empty(0, 24), torch.empty(0, 8), bias=bias), None)}
    pool.fill(replace(adapter, deltas=other, footprint=held), {"qkv": [2], "qkv.vectors": [1]})
    assert not here.gain_VO.any()
    assert torch.equal(here.bias_VO[1], torch.cat([torch.zeros(32), bias, torch.zeros(8)]))
    assert not pool.pools["layers.1.qkv"].a_PSRI.any()


def test_embedding_units_of_a_token_are_adjacent() -> None:
    table = torch.randn(50, 6)
    site = Site("embed", "model", -1, EMBED, (Slice("embed_tokens", 0, 6),), Plain(table))
    assert (site.in_features, site.out_features) == (50, 6)
    adapter = random_adapter([site], 1, {"embed_tokens": 19})
    pool = RankPagePool([site], {"embed": 2}, 1, torch.float32, CPU)
    pool.fill(adapter, {"embed": [1, 0]})
    a, b = units(adapter, site, 0)
    held = pool.pools["embed"]
    assert held.a_PSRI.shape == (2, 1, 50, PAGE_RANK)
    assert torch.equal(held.a_PSRI[1, 0], a[:16].t())
    assert torch.equal(held.a_PSRI[0, 0, :, :3], a[16:].t())
    assert not held.a_PSRI[0, 0, :, 3:].any()
    assert torch.equal(held.b_PRO[1], b[:16])
    assert page_bytes([site], torch.float32)["embed"] == held.bytes // 2


def test_groups_without_pages_have_no_pool() -> None:
    pool = RankPagePool(SITES, {"qkv": 2, "down": 0}, 4, torch.float32, CPU)
    assert set(pool.pools) == {"layers.0.qkv", "layers.1.qkv"}


def test_lanes_are_replaced_and_reset() -> None:
    pool = pages()
    version = pool.version
    pool.set_lane(LanePages(1, {"qkv": [(3, 1.0), (0, 0.5)], "o": []}))
    assert dict(pool.lanes[1]) == {"qkv": ((3, 1.0), (0, 0.5))}
    assert pool.version > version
    pool.set_lane(LanePages(1, {"down": [(1, 1.0)]}))
    assert set(pool.lanes[1]) == {"down"}
    pool.reset_lanes()
    assert pool.lanes == {}


@pytest.mark.parametrize("lane", [LanePages(0, {}), LanePages(5, {}), LanePages(1, {"qkv": [(6, 1.0)]})])
def test_unknown_lanes_and_pages_are_refused(lane: LanePages) -> None:
    with pytest.raises(AssertionError):
        pages().set_lane(lane)
