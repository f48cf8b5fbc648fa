"""scheduler.adapters.device_cache: grants are all or nothing; evictions follow the policy and spare lanes and pins."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import count

import pytest

from engine.messages import AdapterState, Capacity, Footprint
from scheduler.adapters.copies import AdapterCopy, HostCopy, HostState
from scheduler.adapters.device_cache import DeviceCache
from scheduler.adapters.stamp_order import Policy
from scheduler.types import Order

LAST: Order = (0, 99)


def _room(device_cache: DeviceCache, copies: list[AdapterCopy], order: Order = LAST) -> list[AdapterCopy]:
    evicted = device_cache.evict_for(copies, order)
    _reclassify(device_cache, evicted)
    return evicted


def _reclassify(device_cache: DeviceCache, copies: Iterable[AdapterCopy]) -> None:
    for copy in copies:
        device_cache.reclassify(copy)


def _cache(pool: int = 4, policy: Policy = "lru", orders: dict[int, Order] | None = None) -> DeviceCache:
    capacity = Capacity(
        kv_pages=1,
        page_size=1,
        rows=1,
        max_length=1,
        max_batched_tokens=1,
        vocab_size=1,
        max_loras=4,
        rank_pages={"qkv": pool},
        max_lane_pages=4,
    )
    return DeviceCache(capacity, policy, count(1).__next__, lambda copy: (orders or {}).get(copy.id))


def _host(copy_id: int, pages: int, pinned: bool = False) -> AdapterCopy:
    info = AdapterState(
        adapter_id=copy_id, state="host", revision=f"r{9 - copy_id}", footprint=Footprint({"qkv": pages})
    )
    return AdapterCopy(copy_id, copy_id, info, loaded_once=True, pinned=pinned, host=HostCopy(HostState.HELD))


def _resident(device_cache: DeviceCache, copy_id: int, pages: int, pinned: bool = False) -> AdapterCopy:
    copy = _host(copy_id, pages, pinned)
    _room(device_cache, [copy])
    assert device_cache.grant([copy], 0) is not None
    assert device_cache.answer_fill(copy)
    device_cache.reclassify(copy)
    return copy


def test_grants_are_all_or_nothing() -> None:
    device_cache = _cache(4)
    one, two = _host(1, 3), _host(2, 2)
    assert device_cache.grant([one, two], 1) is None
    assert device_cache.rank_pages.used() == {"qkv": 0}
    fills = device_cache.grant([one], 1)
    assert [(fill.adapter_id, len(fill.pages["qkv"])) for fill in fills or []] == [(1, 3)]
    assert one.stage == "host"
    device_cache.answer_fill(one)
    device_cache.reclassify(one)
    assert one.stage == "resident"
    device_cache.audit([one, two], {})


@pytest.mark.parametrize(("policy", "gone"), [("lru", [2, 3]), ("fifo", [1, 2])])
def test_evictions_go_by_the_policy_or_are_none(policy: Policy, gone: list[int]) -> None:
    device_cache = _cache(4, policy)
    copies = [_resident(device_cache, i, 1) for i in (1, 2, 3)]
    _reclassify(device_cache, device_cache.acquire(copies[:1]))
    _reclassify(device_cache, device_cache.release(copies[:1]))  # copy 1 was filled first and used last
    assert _room(device_cache, [_host(4, 5)]) == []
    assert [copy.id for copy in _room(device_cache, [_host(4, 3)])] == gone
    assert [copy.id for copy in copies if not copy.on_device] == gone
    device_cache.audit(copies, {})


def test_copies_in_lanes_and_pinned_copies_stay() -> None:
    device_cache = _cache(4)
    one, two = _resident(device_cache, 1, 2), _resident(device_cache, 2, 2, pinned=True)
    _reclassify(device_cache, device_cache.acquire([one]))
    newcomer = _host(3, 1)
    assert _room(device_cache, [newcomer]) == []
    _reclassify(device_cache, device_cache.release([one]))
    assert _room(device_cache, [newcomer]) == [one]
    two.pinned = False
    device_cache.reclassify(two)
    assert _room(device_cache, [_host(4, 4)]) == [two]


def test_spare_copies_are_evicted_before_wanted_ones() -> None:
    device_cache = _cache(4, orders={1: (0, 3), 2: (0, 8), 3: (0, 9)})
    copies = [_resident(device_cache, number, 1) for number in (1, 2, 3, 4)]
    assert _room(device_cache, [_host(5, 4)], (0, 5)) == [], "a request before it needs copy 1"
    assert [copy.id for copy in _room(device_cache, [_host(5, 2)], (0, 5))] == [4, 3]
    assert [copy.id for copy in _room(device_cache, [_host(5, 3)], (0, 5))] == [2]
    assert _room(device_cache, [_host(5, 4)], (0, 3)) == [], "the same request needs copy 1"
    device_cache.audit(copies, {})


def test_mix_does_not_evict_its_own_parts() -> None:
    device_cache = _cache(3)
    one, other = _resident(device_cache, 1, 1), _resident(device_cache, 2, 2)
    new = _host(3, 2)
    assert _room(device_cache, [one, new]) == [other]
    assert [fill.adapter_id for fill in device_cache.grant([one, new], 1) or []] == [3]


def test_evicted_pages_cool_while_a_step_names_them() -> None:
    device_cache = _cache(2)
    one = _resident(device_cache, 1, 2)
    device_cache.mark_used([one], 7)
    two = _host(2, 1)
    assert _room(device_cache, [two]) == [one]
    assert device_cache.grant([two], 8) is None
    assert _room(device_cache, [two]) == []
    device_cache.step_done(7)
    assert device_cache.grant([two], 8) is not None


def test_lane_holds_the_pages_of_a_mix_by_revision() -> None:
    device_cache = _cache(3)
    one, two = _resident(device_cache, 1, 1), _resident(device_cache, 2, 2)
    pairs = device_cache.lane_pages([(one, 0.5), (two, 1.5)])["qkv"]
    assert pairs == [
        *((page, 1.5) for page in two.device.pages["qkv"]),
        *((page, 0.5) for page in one.device.pages["qkv"]),
    ]


def test_audit_finds_wrong_lanes_and_pages() -> None:
    device_cache = _cache(4)
    one = _resident(device_cache, 1, 1)
    for lanes in ({1: 1}, {2: 1}):
        with pytest.raises(AssertionError):
            device_cache.audit([one], lanes)
    one.device.pages = {}
    with pytest.raises(AssertionError, match="rank pages"):
        device_cache.audit([one], {})
