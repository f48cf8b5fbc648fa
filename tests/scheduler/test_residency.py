"""scheduler.residency: all or nothing, the longest idle first, never what is used or pinned."""

from __future__ import annotations

import pytest

from engine.messages import AdapterState, Capacity, Footprint, LoadAdapter
from scheduler.residency import Adapter, Residency, Stage


def _residency(pool: int = 4) -> Residency:
    return Residency(
        Capacity(
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
    )


def _host(residency: Residency, adapter_id: int, pages: int, pinned: bool = False) -> Adapter:
    adapter = residency.load(LoadAdapter(adapter_id=adapter_id, path="p", pinned=pinned))
    card = AdapterState(
        adapter_id=adapter_id, state="host", revision=f"r{9 - adapter_id}", footprint=Footprint({"qkv": pages})
    )
    residency.loaded(adapter, card)
    return adapter


def _resident(residency: Residency, adapter_id: int, pages: int, pinned: bool = False) -> Adapter:
    adapter = _host(residency, adapter_id, pages, pinned)
    residency.make_room([adapter])
    assert residency.grant([adapter], 0) is not None
    residency.filled(adapter)
    return adapter


def test_grants_are_all_or_nothing() -> None:
    residency = _residency(4)
    one, two = _host(residency, 1, 3), _host(residency, 2, 2)
    assert residency.grant([one, two], 1) is None
    assert residency.rank_pages.used() == {"qkv": 0}
    fills = residency.grant([one], 1)
    assert [(fill.adapter_id, len(fill.pages["qkv"])) for fill in fills or []] == [(1, 3)]
    assert one.report().state == "host"
    residency.filled(one)
    assert one.report().state == "resident"
    residency.audit({}, {})


def test_the_longest_idle_goes_first_and_only_if_it_is_enough() -> None:
    residency = _residency(4)
    one, two, three = (_resident(residency, i, 1) for i in (1, 2, 3))
    residency.promise(((1, 1.0),))
    residency.release(((1, 1.0),))  # 1 was used last
    assert residency.make_room([_host(residency, 4, 3)]) == [two, three]
    assert [a.stage for a in (one, two, three)] == [Stage.RESIDENT, Stage.HOST, Stage.HOST]
    residency.audit({}, {})


def test_used_and_pinned_adapters_stay() -> None:
    residency = _residency(4)
    one, two = _resident(residency, 1, 2), _resident(residency, 2, 2, pinned=True)
    residency.promise(((1, 0.5),))
    newcomer = _host(residency, 3, 1)
    assert residency.make_room([newcomer]) == []
    residency.release(((1, 0.5),))
    assert residency.make_room([newcomer]) == [one]
    residency.pin(two, False)
    assert residency.make_room([_host(residency, 4, 4)]) == [two]


def test_a_mix_does_not_evict_its_own_parts() -> None:
    residency = _residency(3)
    one = _resident(residency, 1, 1)
    other = _resident(residency, 2, 2)
    new = _host(residency, 3, 2)
    assert residency.make_room([one, new]) == [other]
    assert [fill.adapter_id for fill in residency.grant([one, new], 1) or []] == [3]


def test_evicted_pages_cool_while_a_step_names_them() -> None:
    residency = _residency(2)
    one = _resident(residency, 1, 2)
    residency.named([((1, 1.0),)], step=7)
    two = _host(residency, 2, 1)
    assert residency.make_room([two]) == [one]
    assert residency.grant([two], 8) is None
    assert residency.make_room([two]) == []
    residency.rank_pages.step_done(7)
    assert residency.grant([two], 8) is not None


def test_a_lane_holds_the_pages_of_a_mix_by_revision() -> None:
    residency = _residency(3)
    one, two = _resident(residency, 1, 1), _resident(residency, 2, 2)
    pairs = residency.lane_pages(((1, 0.5), (2, 1.5)))["qkv"]
    assert pairs == [*((page, 1.5) for page in two.pages["qkv"]), *((page, 0.5) for page in one.pages["qkv"])]


def test_problems_are_named() -> None:
    residency = _residency(6)
    assert "adapter 1 is not loaded" in (residency.problem(((1, 1.0),)) or "")
    _host(residency, 1, 7)
    assert "needs 7 LoRA rank pages of group qkv" in (residency.problem(((1, 1.0),)) or "")
    _host(residency, 2, 3)
    _host(residency, 3, 3)
    assert residency.problem(((2, 1.0),)) is None
    assert "6 rank pages long" in (residency.problem(((2, 1.0), (3, 1.0))) or "")
    failing = residency.load(LoadAdapter(adapter_id=4, path="p"))
    residency.failed(failing, "no such file")
    assert residency.problem(((4, 1.0),)) == "no such file"


def test_hopeless_beside_the_pinned() -> None:
    residency = _residency(4)
    _resident(residency, 1, 3, pinned=True)
    two = _host(residency, 2, 2)
    assert "pinned" in (residency.hopeless([two]) or "")
    assert residency.hopeless([_host(residency, 3, 1)]) is None


def test_a_new_runner_holds_nothing() -> None:
    residency = _residency(4)
    one, failing = _resident(residency, 1, 3), residency.load(LoadAdapter(adapter_id=2, path="p"))
    residency.failed(failing, "broken")
    assert residency.reset(residency._capacity) == [one]
    assert (one.stage, one.pages, failing.stage) == (Stage.LOADING, {}, Stage.FAILED)
    residency.audit({}, {})


def test_the_audit_sees_users_and_requests_that_do_not_add_up() -> None:
    residency = _residency(4)
    one = _resident(residency, 1, 1)
    for users, requests in [({1: 1}, {}), ({}, {1: 1}), ({2: 1}, {})]:
        with pytest.raises(AssertionError):
            residency.audit(users, requests)
    one.pages = {}
    with pytest.raises(AssertionError, match="rank pages"):
        residency.audit({}, {})
