"""scheduler.kv_cache.kv_cache_manager: which pages a request gets, shares and leaves in the tree."""

from __future__ import annotations

import pytest
from fixtures.scheduling.kv_rows import ONE, OTHER, PROMPT, Rows, request_of

from scheduler.types import Owner


def test_repeated_prompt_computes_only_what_no_full_page_holds() -> None:
    rows = Rows()
    assert rows.run(PROMPT).computed == 0
    assert (rows.kv.used, rows.kv.free, len(rows.tree)) == (0, 16, 2)
    assert rows.run(PROMPT).computed == 8
    assert rows.run([*PROMPT[:6], 0, 0, 0]).computed == 4
    assert rows.run(PROMPT[1:]).computed == 0


def test_full_hit_computes_one_token_in_its_own_page() -> None:
    rows = Rows()
    rows.run(PROMPT[:8])
    rows.plan()
    again = rows.admit(request_of(PROMPT[:8]))
    shared = [node.page for node in again.prefix.path()] if again.prefix else []
    assert (again.computed, len(shared), len(again.pages)) == (4, 1, 2)
    assert again.pages[0] in rows.tree.pages()
    assert again.pages[1] not in rows.tree.pages()
    rows.compute(again)  # the tree already has this page: the row keeps its own copy until it ends
    assert (rows.kv.block_pool.used, rows.kv.used) == (3, 2)
    rows.end(again)
    assert rows.kv.block_pool.used == 2


@pytest.mark.parametrize(("owner", "cache_salt"), [((), ""), (OTHER, "t"), (ONE, ""), (ONE, "u")])
def test_pages_are_not_shared_across_owners_and_cache_salts(owner: Owner, cache_salt: str) -> None:
    rows = Rows()
    rows.run(PROMPT, ONE, "t")
    assert rows.run(PROMPT, owner, cache_salt).computed == 0
    assert rows.run(PROMPT, ONE, "t").computed == 8


def test_running_rows_pages_are_shared_after_the_writing_step() -> None:
    rows = Rows()
    rows.plan()
    first = rows.admit(request_of(PROMPT))
    rows.compute(first, end=9)
    second, other = request_of([*PROMPT, 7]), request_of([*PROMPT, *range(30)])
    assert not rows.kv.can_allocate(second, (), 0), (
        "this step computes most of its prompt, so it waits for the next one"
    )
    rows.admit(other)
    assert other.computed == 0, "waiting would save it too little"
    rows.plan()
    assert rows.admit(second).computed == 8
    assert second.pages[:2] == first.pages[:2]
    for request in (first, second, other):
        rows.end(request)


def test_generated_tokens_are_shared_once_they_are_known() -> None:
    rows = Rows()
    rows.plan()
    request = rows.admit(request_of(PROMPT))
    rows.compute(request)
    rows.learn(request, 1, 2)
    assert len(rows.tree) == 2, "the last token of page 2 is known, but a later step computes it"
    rows.learn(request, 3)
    assert len(rows.tree) == 3
    rows.end(request)
    assert rows.run([*PROMPT, 1, 2, 9]).computed == 12


def test_tokens_in_flight_are_not_inserted() -> None:
    rows = Rows()
    rows.plan()
    request = rows.admit(request_of(PROMPT))
    rows.compute(request)
    request.computed += 2  # two positions whose tokens are not known yet
    rows.end(request)
    assert len(rows.tree) == 2


def test_positions_to_be_scored_are_computed() -> None:
    rows = Rows()
    rows.run(PROMPT)
    rows.plan()
    scored = request_of(PROMPT, scores=True)
    rows.admit(scored)
    assert scored.computed == 0
    rows.compute(scored)
    scored.scored = 6  # six positions are scored when it is preempted
    rows.end(scored)
    rows.plan()
    assert rows.admit(scored).computed == 4
    rows.end(scored)
    scored.scored = scored.to_score
    rows.plan()
    assert rows.admit(scored).computed == 8


def test_eviction_takes_the_least_recently_used_pages_first() -> None:
    rows = Rows(pages=6)
    rows.run(PROMPT)
    rows.run([*range(8)])
    rows.run(PROMPT)
    rows.plan()
    large = rows.admit(request_of([50] * 16))
    assert rows.kv.evictions == 2
    rows.end(large)
    assert rows.run(PROMPT).computed == 8
    assert rows.run([*range(8)]).computed == 0


def test_shared_prefix_does_not_count_as_free() -> None:
    rows = Rows(pages=4)
    rows.run(PROMPT[:8])
    rows.plan()
    assert rows.kv.free == 4
    assert not rows.kv.can_allocate(request_of([*PROMPT[:8], *range(9)]), (), 0), "five pages"
    fits = request_of([*PROMPT[:8], *range(8)])
    assert not rows.kv.can_allocate(fits, (), 1)
    rows.admit(fits)
    assert rows.kv.free == 0


def test_prefix_found_while_waiting_may_be_evicted_meanwhile() -> None:
    rows = Rows(pages=8)
    rows.run([*PROMPT, 1, 2])
    rows.plan()
    waits = request_of([*PROMPT, 1, 2, 3, 4, 5])
    assert rows.kv.can_allocate(waits, (), 0)
    assert waits.prefix is not None
    assert waits.prefix.depth == 3
    rows.end(rows.admit(request_of([50] * 28)))  # evicts two of the three pages
    rows.plan()
    assert rows.admit(waits).computed == 4


def test_rows_that_compute_the_same_page_keep_their_own() -> None:
    rows = Rows()
    rows.plan()
    first, second = rows.admit(request_of(PROMPT)), rows.admit(request_of(PROMPT))
    rows.compute(first)
    rows.compute(second)
    assert not set(first.pages) & set(second.pages)
    rows.learn(second, 5, 5, 5)
    assert len(rows.tree) == 2, "its first two pages are duplicates, so its third cannot be inserted yet"
    rows.end(first)
    rows.end(second)
    assert (rows.kv.block_pool.used, rows.kv.used, rows.run([*PROMPT, 5, 5, 6]).computed) == (3, 0, 12)


def test_pages_do_not_outlive_their_row_without_reuse() -> None:
    rows = Rows(reuse=False)
    for _ in range(2):
        assert rows.run(PROMPT).computed == 0
        assert rows.kv.block_pool.used == len(rows.tree) == 0


def test_partial_audit_reaches_every_page() -> None:
    rows = Rows(pages=64)
    rows.run([*range(200)])
    rows.plan()
    runs = rows.admit(request_of(PROMPT))
    rows.compute(runs)
    assert runs.prefix is not None
    for _ in range(30):
        rows.kv.audit(rows.running, at_most=5)
    runs.prefix.holds += 1
    with pytest.raises(AssertionError, match="counts 2 holds"):
        [rows.kv.audit(rows.running, at_most=5) for _ in range(30)]
    runs.prefix.holds -= 1
    runs.pages.append(9)
    with pytest.raises(AssertionError, match="references, and"):
        rows.kv.audit(rows.running, at_most=5)


def test_audit_finds_a_row_with_foreign_pages() -> None:
    rows = Rows()
    rows.plan()
    request = rows.admit(request_of(PROMPT))
    rows.compute(request)
    request.tokens[0] = 0
    with pytest.raises(AssertionError, match="other tokens"):
        rows.kv.audit(rows.running)
    request.tokens[0], request.cache_salt = PROMPT[0], "else"
    with pytest.raises(AssertionError, match="another cache_salt"):
        rows.kv.audit(rows.running)
