"""scheduler.kv_cache.block_pool: no page is allocated twice or lost, and page 0 is never allocated."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.kv_cache.block_pool import BlockPool


def test_pool_allocates_every_page_but_zero() -> None:
    pages = BlockPool(4)
    assert sorted(pages.allocate(4)) == [1, 2, 3, 4]
    assert (pages.free, pages.used) == (0, 4)
    with pytest.raises(AssertionError, match="0 free"):
        pages.allocate(1)


def test_shared_page_is_free_after_its_last_release() -> None:
    pages = BlockPool(2)
    (page,) = pages.allocate(1)
    pages.share([page])
    pages.release([page])
    assert pages.used == 1
    pages.audit([page])
    pages.release([page])
    assert pages.free == 2
    with pytest.raises(AssertionError, match="once too often"):
        pages.release([page])
    with pytest.raises(AssertionError, match="is free"):
        pages.share([page])


def test_audit_finds_leaks_and_unknown_references() -> None:
    pages = BlockPool(3)
    held = pages.allocate(2)
    pages.audit(held)
    with pytest.raises(AssertionError, match="other references"):
        pages.audit(held[:1])
    with pytest.raises(AssertionError, match="other references"):
        pages.audit([*held, held[0]])
    with pytest.raises(AssertionError, match="does not exist"):
        pages.audit([*held, 9])


@given(st.lists(st.tuples(st.sampled_from(["allocate", "share", "release"]), st.integers(0, 5)), max_size=40))
def test_references_balance_after_any_history(history: list[tuple[str, int]]) -> None:
    pages, held = BlockPool(8), []
    for action, number in history:
        if action == "allocate" and number <= pages.free:
            held += pages.allocate(number)
        elif action == "share" and held:
            held.append(held[number % len(held)])
            pages.share(held[-1:])
        elif action == "release" and held:
            pages.release([held.pop(number % len(held))])
        pages.audit(held)
        assert pages.used == len(set(held))
