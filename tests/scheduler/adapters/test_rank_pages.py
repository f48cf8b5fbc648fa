"""scheduler.adapters.rank_pages: a released page cools (is not reused) until the last step that uses it is done."""

from __future__ import annotations

import pytest

from scheduler.adapters.rank_pages import RankPages


def test_rank_pages_cool_until_their_last_step_is_done() -> None:
    pool = RankPages({"qkv": 2, "o": 1})
    pages = pool.grant({"qkv": 2, "o": 0})
    assert (sorted(pages["qkv"]), "o" in pages) == ([0, 1], False)
    assert pool.lacking({"qkv": 1, "o": 1, "head": 1}) == {"qkv": 1, "head": 1}
    pool.release(pages, last_step=5)
    assert pool.lacking({"qkv": 2}) == {"qkv": 2}
    assert pool.lacking({"qkv": 2}, with_cooling=True) == {}
    pool.audit([])
    pool.step_done(4)
    assert pool.lacking({"qkv": 1})
    pool.step_done(5)
    assert not pool.lacking({"qkv": 2})
    pool.release(pool.grant({"qkv": 1}), last_step=5)  # step 5 is done: free at once
    assert pool.used() == {"qkv": 0, "o": 0}


def test_rank_page_audit_finds_a_leak() -> None:
    pool = RankPages({"qkv": 2})
    pool.grant({"qkv": 1})
    with pytest.raises(AssertionError, match="rank pages of qkv"):
        pool.audit([])
