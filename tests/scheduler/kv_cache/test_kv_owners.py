"""scheduler.kv_cache.kv_cache_manager: pages of dropped revisions and of activated LoRAs."""

from __future__ import annotations

import pytest
from fixtures.scheduling.kv_rows import ONE, OTHER, PAGE, PROMPT, Rows, request_of


def test_dropped_revision_is_not_found_and_frees_on_release() -> None:
    rows = Rows()
    rows.run(PROMPT, ONE)
    rows.plan()
    runs = rows.admit(request_of([*PROMPT, 1, 2]), OTHER)
    rows.compute(runs)
    rows.kv.drop_revision("r1")
    rows.kv.audit(rows.running)
    assert (rows.kv.block_pool.used, len(rows.tree)) == (3, 3)
    rows.learn(runs, 3, 4, 5, 6, 7)
    assert rows.run(PROMPT, OTHER).computed == 0, "the running row's pages are of the dropped revision"
    rows.end(runs)
    assert (rows.kv.block_pool.used, len(rows.tree)) == (2, 2)


def test_prefix_found_while_waiting_is_dropped_with_its_revision() -> None:
    rows = Rows()
    rows.plan()
    runs = rows.admit(request_of(PROMPT), ONE)
    rows.compute(runs)
    rows.plan()
    waits = request_of([*PROMPT, 1, 2])
    assert rows.kv.can_allocate(waits, ONE, 0)
    rows.kv.drop_revision("r1")
    assert rows.admit(waits, ONE).computed == 0
    again = request_of([*PROMPT, 3])
    rows.compute(waits)
    rows.plan()
    assert rows.kv.can_allocate(again, ONE, 0)
    assert rows.admit(again, OTHER).computed == 0, "its owner changed while it waited"


LONG_PROMPT = list(range(100, 118))  # four full pages and half of one


@pytest.mark.parametrize("invocation_start", [0, 2, 4, 7, 8, 9, 16])
def test_full_pages_before_the_invocation_are_the_bases(invocation_start: int) -> None:
    shared = invocation_start // PAGE * PAGE
    for first, second in (((), ONE), (ONE, ()), (ONE, OTHER)):
        rows = Rows()
        rows.run(LONG_PROMPT, first, invocation_start=invocation_start if first else None)
        assert rows.run(LONG_PROMPT, second, invocation_start=invocation_start if second else None).computed == shared
        for owner in (first, second):
            assert rows.run(LONG_PROMPT, owner, invocation_start=invocation_start if owner else None).computed == 16
        assert rows.run(LONG_PROMPT, ONE, "t", invocation_start).computed == 0
        assert len(rows.tree) == 4 + (4 - shared // PAGE) + 4


def test_alora_pages_differ_by_the_offset_of_the_invocation() -> None:
    """Generated tokens of one request may be prompt tokens of another: the same tokens get other invocation offsets."""
    rows = Rows()
    rows.run(LONG_PROMPT, ONE, invocation_start=5)
    assert rows.run(LONG_PROMPT, ONE, invocation_start=6).computed == 4
    assert rows.run(LONG_PROMPT, ONE, invocation_start=9).computed == 4
    assert rows.run(LONG_PROMPT, ONE).computed == 0, "a LoRA that acts from the first token shares none of them"
    assert [rows.run(LONG_PROMPT, ONE, invocation_start=at).computed for at in (5, 6, 9)] == [16, 16, 16]


def test_dropped_alora_inserts_only_pages_before_its_invocation() -> None:
    rows = Rows(pages=32)
    rows.plan()
    before, after = (rows.admit(request_of([*LONG_PROMPT, tail], invocation_start=9), ONE) for tail in (1, 2))
    rows.compute(before, 6)
    rows.compute(after)
    rows.kv.drop_revision("r1")
    rows.kv.audit(rows.running)
    rows.compute(before)
    rows.learn(after, 3, 4, 5, 6, 7)
    assert rows.run(LONG_PROMPT, ONE, invocation_start=9).computed == 8
    rows.end(before)
    rows.end(after)
    assert rows.run(LONG_PROMPT).computed == 8
    assert rows.run(LONG_PROMPT, ONE, invocation_start=9).computed == 16, (
        "a request that came after the drop has inserted its own pages"
    )
    assert rows.kv.used == 0
