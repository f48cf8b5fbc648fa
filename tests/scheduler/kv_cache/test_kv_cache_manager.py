"""scheduler.kv_cache.kv_cache_manager: which pages a request is given, shares and leaves behind."""

from __future__ import annotations

import pytest

from engine.messages import Sampling, Stopping
from scheduler.kv_cache.kv_cache_manager import KvCacheManager
from scheduler.requests.request import Request
from scheduler.types import BASE, Owner

PAGE = 4
ONE: Owner = (("r1", 1.0),)
OTHER: Owner = (("r1", 0.5),)


class Rows:
    """A cache with its running rows; steps are numbered as they are planned, the books proved after each."""

    def __init__(self, pages: int = 16, reuse: bool = True) -> None:
        self.kv = KvCacheManager(pages, PAGE, reuse)
        self.running: list[Request] = []
        self.step = 0

    def plan(self) -> None:
        self.step += 1
        self.kv.begin(self.step)

    def admit(self, request: Request, owner: Owner = (), reserve: int = 0) -> Request:
        assert self.kv.admits(request, owner, reserve)
        self.kv.admit(request, owner)
        request.row = 0
        self.running.append(request)
        self.kv.audit(self.running)
        return request

    def compute(self, request: Request, end: int | None = None) -> None:
        request.computed = len(request.tokens) if end is None else end
        self.kv.computed(request)
        self.kv.audit(self.running)

    def learn(self, request: Request, *tokens: int) -> None:
        for token in tokens:
            request.tokens.append(token)
            self.kv.learnt(request)
            self.kv.audit(self.running)
            if request.computed == len(request.pages) * PAGE:
                self.kv.grow(request)
            request.computed += 1

    def end(self, request: Request) -> None:
        self.running.remove(request)
        self.kv.release(request)
        self.kv.audit(self.running)

    def run(self, tokens: list[int], owner: Owner = (), cache_salt: str = "", invoked_at: int | None = None) -> Request:
        """A request from its admission to its end, alone."""
        self.plan()
        request = self.admit(ask(tokens, cache_salt, invoked_at=invoked_at), owner)
        start = request.computed
        self.compute(request)
        self.end(request)
        request.computed = start
        return request


def ask(tokens: list[int], cache_salt: str = "", scores: bool = False, invoked_at: int | None = None) -> Request:
    sampling = Sampling(prompt_logprobs=0 if scores else -1)
    request = Request(1, BASE, (0, 1), len(tokens), list(tokens), sampling, Stopping(9), cache_salt=cache_salt)
    request.invoked_at = invoked_at
    return request


PROMPT = list(range(100, 110))  # two full pages and half of one


def test_the_same_again_computes_only_what_is_not_in_full_pages() -> None:
    rows = Rows()
    assert rows.run(PROMPT).computed == 0
    assert (rows.kv.used, rows.kv.free, len(rows.kv.tree)) == (0, 16, 2)
    assert rows.run(PROMPT).computed == 8
    assert rows.run([*PROMPT[:6], 0, 0, 0]).computed == 4
    assert rows.run(PROMPT[1:]).computed == 0


def test_a_full_hit_computes_one_token_in_a_page_of_its_own() -> None:
    rows = Rows()
    rows.run(PROMPT[:8])
    rows.plan()
    again = rows.admit(ask(PROMPT[:8]))
    shared = [node.page for node in again.prefix.path()] if again.prefix else []
    assert (again.computed, len(shared), len(again.pages)) == (4, 1, 2)
    assert again.pages[0] in rows.kv.tree.pages()
    assert again.pages[1] not in rows.kv.tree.pages()
    rows.compute(again)  # the tree has this page already: the row keeps its own until it ends
    assert (rows.kv.pages.used, rows.kv.used) == (3, 2)
    rows.end(again)
    assert rows.kv.pages.used == 2


@pytest.mark.parametrize(("owner", "cache_salt"), [((), ""), (OTHER, "t"), (ONE, ""), (ONE, "u")])
def test_nothing_is_shared_with_another_owner_or_tenant(owner: Owner, cache_salt: str) -> None:
    rows = Rows()
    rows.run(PROMPT, ONE, "t")
    assert rows.run(PROMPT, owner, cache_salt).computed == 0
    assert rows.run(PROMPT, ONE, "t").computed == 8


def test_pages_are_shared_while_the_first_still_runs_but_not_in_the_step_that_writes_them() -> None:
    rows = Rows()
    rows.plan()
    first = rows.admit(ask(PROMPT))
    rows.compute(first, end=9)
    second, other = ask([*PROMPT, 7]), ask([*PROMPT, *range(30)])
    assert not rows.kv.admits(second, (), 0), "most of it is computed by this step: it waits for the next"
    rows.admit(other)
    assert other.computed == 0, "that would save it too little to wait for"
    rows.plan()
    assert rows.admit(second).computed == 8
    assert second.pages[:2] == first.pages[:2]
    for request in (first, second, other):
        rows.end(request)


def test_generated_tokens_are_found_once_they_are_known() -> None:
    rows = Rows()
    rows.plan()
    request = rows.admit(ask(PROMPT))
    rows.compute(request)
    rows.learn(request, 1, 2)
    assert len(rows.kv.tree) == 2, "the last token of page 2 is known, and computed by a later step"
    rows.learn(request, 3)
    assert len(rows.kv.tree) == 3
    rows.end(request)
    assert rows.run([*PROMPT, 1, 2, 9]).computed == 12


def test_tokens_in_flight_are_not_entered() -> None:
    rows = Rows()
    rows.plan()
    request = rows.admit(ask(PROMPT))
    rows.compute(request)
    request.computed += 2  # two steps ahead of what is known
    rows.end(request)
    assert len(rows.kv.tree) == 2


def test_what_is_to_be_scored_is_computed() -> None:
    rows = Rows()
    rows.run(PROMPT)
    rows.plan()
    scored = ask(PROMPT, scores=True)
    rows.admit(scored)
    assert scored.computed == 0
    rows.compute(scored)
    scored.scored = 6  # then it gives way
    rows.end(scored)
    rows.plan()
    assert rows.admit(scored).computed == 4
    rows.end(scored)
    scored.scored = scored.to_score
    rows.plan()
    assert rows.admit(scored).computed == 8


def test_idle_pages_go_when_others_are_needed_the_longest_unused_first() -> None:
    rows = Rows(pages=6)
    rows.run(PROMPT)
    rows.run([*range(8)])
    rows.run(PROMPT)
    rows.plan()
    large = rows.admit(ask([50] * 16))
    assert rows.kv.evictions == 2
    rows.end(large)
    assert rows.run(PROMPT).computed == 8
    assert rows.run([*range(8)]).computed == 0


def test_a_prefix_that_is_taken_is_not_counted_as_free() -> None:
    rows = Rows(pages=4)
    rows.run(PROMPT[:8])
    rows.plan()
    assert rows.kv.free == 4
    assert not rows.kv.admits(ask([*PROMPT[:8], *range(9)]), (), 0), "five pages"
    fits = ask([*PROMPT[:8], *range(8)])
    assert not rows.kv.admits(fits, (), 1)
    rows.admit(fits)
    assert rows.kv.free == 0


def test_what_was_found_while_waiting_may_be_gone_when_its_turn_comes() -> None:
    rows = Rows(pages=8)
    rows.run([*PROMPT, 1, 2])
    rows.plan()
    waits = ask([*PROMPT, 1, 2, 3, 4, 5])
    assert rows.kv.admits(waits, (), 0)
    assert waits.prefix is not None
    assert waits.prefix.depth == 3
    rows.end(rows.admit(ask([50] * 28)))  # evicts two of the three
    rows.plan()
    assert rows.admit(waits).computed == 4


def test_rows_that_compute_the_same_side_by_side_keep_their_own_pages() -> None:
    rows = Rows()
    rows.plan()
    first, second = rows.admit(ask(PROMPT)), rows.admit(ask(PROMPT))
    rows.compute(first)
    rows.compute(second)
    assert not set(first.pages) & set(second.pages)
    rows.learn(second, 5, 5, 5)
    assert len(rows.kv.tree) == 2, "its first two pages are duplicates, so the third has no place yet"
    rows.end(first)
    rows.end(second)
    assert (rows.kv.pages.used, rows.kv.used, rows.run([*PROMPT, 5, 5, 6]).computed) == (3, 0, 12)


def test_a_dropped_revision_is_found_no_more_and_its_pages_are_free_when_they_are_released() -> None:
    rows = Rows()
    rows.run(PROMPT, ONE)
    rows.plan()
    runs = rows.admit(ask([*PROMPT, 1, 2]), OTHER)
    rows.compute(runs)
    rows.kv.drop("r1")
    rows.kv.audit(rows.running)
    assert (rows.kv.pages.used, len(rows.kv.tree)) == (3, 3)
    rows.learn(runs, 3, 4, 5, 6, 7)
    assert rows.run(PROMPT, OTHER).computed == 0, "what runs is of the dropped one"
    rows.end(runs)
    assert (rows.kv.pages.used, len(rows.kv.tree)) == (2, 2)


def test_what_was_found_while_waiting_is_of_no_use_when_it_is_dropped() -> None:
    rows = Rows()
    rows.plan()
    runs = rows.admit(ask(PROMPT), ONE)
    rows.compute(runs)
    rows.plan()
    waits = ask([*PROMPT, 1, 2])
    assert rows.kv.admits(waits, ONE, 0)
    rows.kv.drop("r1")
    assert rows.admit(waits, ONE).computed == 0
    again = ask([*PROMPT, 3])
    rows.compute(waits)
    rows.plan()
    assert rows.kv.admits(again, ONE, 0)
    assert rows.admit(again, OTHER).computed == 0, "it turned out to be of another owner"


LONG_PROMPT = list(range(100, 118))  # four full pages and half of one


@pytest.mark.parametrize("invoked_at", [0, 2, 4, 7, 8, 9, 16])
def test_what_is_full_before_the_invocation_is_the_bases(invoked_at: int) -> None:
    shared = invoked_at // PAGE * PAGE
    for first, second in (((), ONE), (ONE, ()), (ONE, OTHER)):
        rows = Rows()
        rows.run(LONG_PROMPT, first, invoked_at=invoked_at if first else None)
        assert rows.run(LONG_PROMPT, second, invoked_at=invoked_at if second else None).computed == shared
        for owner in (first, second):
            assert rows.run(LONG_PROMPT, owner, invoked_at=invoked_at if owner else None).computed == 16
        assert rows.run(LONG_PROMPT, ONE, "t", invoked_at).computed == 0
        assert len(rows.kv.tree) == 4 + (4 - shared // PAGE) + 4


def test_the_same_tokens_invoked_elsewhere_are_other_pages() -> None:
    """What was generated by the one was prompt of the other, so that they begin at different places of one page."""
    rows = Rows()
    rows.run(LONG_PROMPT, ONE, invoked_at=5)
    assert rows.run(LONG_PROMPT, ONE, invoked_at=6).computed == 4
    assert rows.run(LONG_PROMPT, ONE, invoked_at=9).computed == 4
    assert rows.run(LONG_PROMPT, ONE).computed == 0, "nor does one that acts from the first token on have any of them"
    assert [rows.run(LONG_PROMPT, ONE, invoked_at=at).computed for at in (5, 6, 9)] == [16, 16, 16]


def test_a_dropped_revision_enters_nothing_after_its_invocation_and_all_that_is_before() -> None:
    rows = Rows(pages=32)
    rows.plan()
    before, after = (rows.admit(ask([*LONG_PROMPT, tail], invoked_at=9), ONE) for tail in (1, 2))
    rows.compute(before, 6)
    rows.compute(after)
    rows.kv.drop("r1")
    rows.kv.audit(rows.running)
    rows.compute(before)
    rows.learn(after, 3, 4, 5, 6, 7)
    assert rows.run(LONG_PROMPT, ONE, invoked_at=9).computed == 8
    rows.end(before)
    rows.end(after)
    assert rows.run(LONG_PROMPT).computed == 8
    assert rows.run(LONG_PROMPT, ONE, invoked_at=9).computed == 16, "one that came later has pages of its own"
    assert rows.kv.used == 0


def test_without_reuse_no_page_outlives_its_row() -> None:
    rows = Rows(reuse=False)
    for _ in range(2):
        assert rows.run(PROMPT).computed == 0
        assert rows.kv.pages.used == len(rows.kv.tree) == 0


def test_a_partial_audit_comes_round_to_every_page() -> None:
    rows = Rows(pages=64)
    rows.run([*range(200)])
    rows.plan()
    runs = rows.admit(ask(PROMPT))
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


def test_the_audit_sees_a_row_with_pages_of_others() -> None:
    rows = Rows()
    rows.plan()
    request = rows.admit(ask(PROMPT))
    rows.compute(request)
    request.tokens[0] = 0
    with pytest.raises(AssertionError, match="another's tokens"):
        rows.kv.audit(rows.running)
    request.tokens[0], request.cache_salt = PROMPT[0], "else"
    with pytest.raises(AssertionError, match="another tenant"):
        rows.kv.audit(rows.running)
