"""scheduler.adapters.device_cache: all or nothing, in the order of the policy, never what is used or pinned."""

from __future__ import annotations

from itertools import count

import pytest

from engine.messages import AdapterState, Capacity, Footprint
from scheduler.adapters.copies import Copy, Device, Host
from scheduler.adapters.device_cache import DeviceCache
from scheduler.adapters.eviction import Policy
from scheduler.types import Order

ANYONE: Order = (0, 99)


def _room(device_cache: DeviceCache, copies: list[Copy], order: Order = ANYONE) -> list[Copy]:
    return device_cache.make_room(copies, order)


def _cache(pool: int = 4, policy: Policy = "lru", places: dict[int, Order] | None = None) -> DeviceCache:
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
    return DeviceCache(capacity, policy, count(1).__next__, lambda copy: (places or {}).get(copy.id))


def _host(copy_id: int, pages: int, pinned: bool = False) -> Copy:
    card = AdapterState(
        adapter_id=copy_id, state="host", revision=f"r{9 - copy_id}", footprint=Footprint({"qkv": pages})
    )
    return Copy(copy_id, copy_id, card, known=True, host=Host.HELD, pinned=pinned)


def _resident(device_cache: DeviceCache, copy_id: int, pages: int, pinned: bool = False) -> Copy:
    copy = _host(copy_id, pages, pinned)
    _room(device_cache, [copy])
    assert device_cache.grant([copy], 0) is not None
    device_cache.filled(copy)
    return copy


def test_grants_are_all_or_nothing() -> None:
    device_cache = _cache(4)
    one, two = _host(1, 3), _host(2, 2)
    assert device_cache.grant([one, two], 1) is None
    assert device_cache.rank_pages.used() == {"qkv": 0}
    fills = device_cache.grant([one], 1)
    assert [(fill.adapter_id, len(fill.pages["qkv"])) for fill in fills or []] == [(1, 3)]
    assert one.stage == "host"
    device_cache.filled(one)
    assert one.stage == "resident"
    device_cache.audit([one, two], {})


@pytest.mark.parametrize(("policy", "gone"), [("lru", [2, 3]), ("fifo", [1, 2])])
def test_the_policy_says_who_goes_and_only_if_it_is_enough(policy: Policy, gone: list[int]) -> None:
    device_cache = _cache(4, policy)
    copies = [_resident(device_cache, i, 1) for i in (1, 2, 3)]
    device_cache.use(copies[:1])
    device_cache.leave(copies[:1])  # 1 was filled first and used last
    assert _room(device_cache, [_host(4, 5)]) == []
    assert [copy.id for copy in _room(device_cache, [_host(4, 3)])] == gone
    assert [copy.id for copy in copies if copy.device is Device.NONE] == gone
    device_cache.audit(copies, {})


def test_used_and_pinned_copies_stay() -> None:
    device_cache = _cache(4)
    one, two = _resident(device_cache, 1, 2), _resident(device_cache, 2, 2, pinned=True)
    device_cache.use([one])
    newcomer = _host(3, 1)
    assert _room(device_cache, [newcomer]) == []
    device_cache.leave([one])
    assert _room(device_cache, [newcomer]) == [one]
    two.pinned = False
    device_cache.reclassify(two)
    assert _room(device_cache, [_host(4, 4)]) == [two]


def test_spare_copies_go_first_and_then_those_that_only_later_ones_wait_for() -> None:
    device_cache = _cache(4, places={1: (0, 3), 2: (0, 8), 3: (0, 9)})
    copies = [_resident(device_cache, number, 1) for number in (1, 2, 3, 4)]
    assert _room(device_cache, [_host(5, 4)], (0, 5)) == [], "1 is awaited by somebody before"
    assert [copy.id for copy in _room(device_cache, [_host(5, 2)], (0, 5))] == [4, 3]
    assert [copy.id for copy in _room(device_cache, [_host(5, 3)], (0, 5))] == [2]
    assert _room(device_cache, [_host(5, 4)], (0, 3)) == [], "nor does it go for the very one"
    device_cache.audit(copies, {})


def test_a_mix_does_not_evict_its_own_parts() -> None:
    device_cache = _cache(3)
    one, other = _resident(device_cache, 1, 1), _resident(device_cache, 2, 2)
    new = _host(3, 2)
    assert _room(device_cache, [one, new]) == [other]
    assert [fill.adapter_id for fill in device_cache.grant([one, new], 1) or []] == [3]


def test_evicted_pages_cool_while_a_step_names_them() -> None:
    device_cache = _cache(2)
    one = _resident(device_cache, 1, 2)
    one.last_step = 7
    two = _host(2, 1)
    assert _room(device_cache, [two]) == [one]
    assert device_cache.grant([two], 8) is None
    assert _room(device_cache, [two]) == []
    device_cache.step_done(7)
    assert device_cache.grant([two], 8) is not None


def test_a_lane_holds_the_pages_of_a_mix_by_revision() -> None:
    device_cache = _cache(3)
    one, two = _resident(device_cache, 1, 1), _resident(device_cache, 2, 2)
    pairs = device_cache.lane_pages([(one, 0.5), (two, 1.5)])["qkv"]
    assert pairs == [*((page, 1.5) for page in two.pages["qkv"]), *((page, 0.5) for page in one.pages["qkv"])]


def test_problems_are_named() -> None:
    device_cache = _cache(6)
    assert "needs 7 LoRA rank pages of group qkv" in (device_cache.limit_error([_host(1, 7)]) or "")
    two, three = _host(2, 3), _host(3, 3)
    assert device_cache.limit_error([two]) is None
    assert "6 rank pages long" in (device_cache.limit_error([two, three]) or "")
    three.error = "no such file"
    assert device_cache.limit_error([three]) == "no such file"


def test_hopeless_beside_the_pinned() -> None:
    device_cache = _cache(4)
    pinned = _resident(device_cache, 1, 3, pinned=True)
    assert "pinned" in (device_cache.never_fits([_host(2, 2)], [pinned]) or "")
    assert device_cache.never_fits([_host(3, 1)], [pinned]) is None


def test_the_audit_sees_users_that_do_not_add_up() -> None:
    device_cache = _cache(4)
    one = _resident(device_cache, 1, 1)
    for users in ({1: 1}, {2: 1}):
        with pytest.raises(AssertionError):
            device_cache.audit([one], users)
    one.pages = {}
    with pytest.raises(AssertionError, match="rank pages"):
        device_cache.audit([one], {})
