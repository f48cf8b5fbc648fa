"""scheduler.kv_cache.kv_cache_manager: which pages a request gets, shares and leaves in the tree."""

from __future__ import annotations

import pytest

from engine.messages import Sampling, Stopping
from scheduler.kv_cache.kv_cache_manager import KvCacheManager
from scheduler.kv_cache.radix_cache import RadixCache
from scheduler.requests.request import Request
from scheduler.types import BASE, Owner

PAGE = 4
ONE: Owner = (("r1", 1.0),)
OTHER: Owner = (("r1", 0.5),)


class Rows:
    """A manager with its running rows. Steps are numbered as they are planned, and the audit runs after each call."""

    def __init__(self, pages: int = 16, reuse: bool = True) -> None:
        self.kv = KvCacheManager(pages, PAGE, reuse)
        self.running: list[Request] = []
        self.step = 0

    @property
    def tree(self) -> RadixCache:
        return self.kv.radix_cache

    def plan(self) -> None:
        self.step += 1
        self.kv.begin_step(self.step)

    def admit(self, request: Request, owner: Owner = (), reserve: int = 0) -> Request:
        assert self.kv.can_allocate(request, owner, reserve)
        self.kv.allocate(request, owner)
        request.row = 0
        self.running.append(request)
        self.kv.audit(self.running)
        return request

    def compute(self, request: Request, end: int | None = None) -> None:
        request.computed = len(request.tokens) if end is None else end
        self.kv.chunk_planned(request)
        self.kv.audit(self.running)

    def learn(self, request: Request, *tokens: int) -> None:
        for token in tokens:
            request.tokens.append(token)
            self.kv.token_known(request)
            self.kv.audit(self.running)
            if request.computed == len(request.pages) * PAGE:
                self.kv.append_page(request)
            request.computed += 1

    def end(self, request: Request) -> None:
        self.running.remove(request)
        self.kv.release(request)
        self.kv.audit(self.running)

    def run(
        self, tokens: list[int], owner: Owner = (), cache_salt: str = "", invocation_start: int | None = None
    ) -> Request:
        """Admits, computes and ends a request, with no other beside it; its `computed` is that of its admission."""
        self.plan()
        request = self.admit(ask(tokens, cache_salt, invocation_start=invocation_start), owner)
        start = request.computed
        self.compute(request)
        self.end(request)
        request.computed = start
        return request


def ask(tokens: list[int], cache_salt: str = "", scores: bool = False, invocation_start: int | None = None) -> Request:
    sampling = Sampling(prompt_logprobs=0 if scores else -1)
    request = Request(1, BASE, (0, 1), len(tokens), list(tokens), sampling, Stopping(9), cache_salt=cache_salt)
    request.invocation_start = invocation_start
    return request


PROMPT = list(range(100, 110))  # two full pages and half of one


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
    again = rows.admit(ask(PROMPT[:8]))
    shared = [node.page for node in again.prefix.path()] if again.prefix else []
    assert (again.computed, len(shared), len(again.pages)) == (4, 1, 2)
    assert again.pages[0] in rows.tree.pages()
    assert again.pages[1] not in rows.tree.pages()
    rows.compute(again)  # the tree has this page: the row keeps its own copy until it ends
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
    first = rows.admit(ask(PROMPT))
    rows.compute(first, end=9)
    second, other = ask([*PROMPT, 7]), ask([*PROMPT, *range(30)])
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
    request = rows.admit(ask(PROMPT))
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
    request = rows.admit(ask(PROMPT))
    rows.compute(request)
    request.computed += 2  # two steps ahead of what is known
    rows.end(request)
    assert len(rows.tree) == 2


def test_positions_to_be_scored_are_computed() -> None:
    rows = Rows()
    rows.run(PROMPT)
    rows.plan()
    scored = ask(PROMPT, scores=True)
    rows.admit(scored)
    assert scored.computed == 0
    rows.compute(scored)
    scored.scored = 6  # then it is preempted
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
    large = rows.admit(ask([50] * 16))
    assert rows.kv.evictions == 2
    rows.end(large)
    assert rows.run(PROMPT).computed == 8
    assert rows.run([*range(8)]).computed == 0


def test_shared_prefix_does_not_count_as_free() -> None:
    rows = Rows(pages=4)
    rows.run(PROMPT[:8])
    rows.plan()
    assert rows.kv.free == 4
    assert not rows.kv.can_allocate(ask([*PROMPT[:8], *range(9)]), (), 0), "five pages"
    fits = ask([*PROMPT[:8], *range(8)])
    assert not rows.kv.can_allocate(fits, (), 1)
    rows.admit(fits)
    assert rows.kv.free == 0


def test_prefix_found_while_waiting_may_be_evicted_meanwhile() -> None:
    rows = Rows(pages=8)
    rows.run([*PROMPT, 1, 2])
    rows.plan()
    waits = ask([*PROMPT, 1, 2, 3, 4, 5])
    assert rows.kv.can_allocate(waits, (), 0)
    assert waits.prefix is not None
    assert waits.prefix.depth == 3
    rows.end(rows.admit(ask([50] * 28)))  # evicts two of the three
    rows.plan()
    assert rows.admit(waits).computed == 4


def test_rows_that_compute_the_same_page_keep_their_own() -> None:
    rows = Rows()
    rows.plan()
    first, second = rows.admit(ask(PROMPT)), rows.admit(ask(PROMPT))
    rows.compute(first)
    rows.compute(second)
    assert not set(first.pages) & set(second.pages)
    rows.learn(second, 5, 5, 5)
    assert len(rows.tree) == 2, "its first two pages are duplicates, so its third cannot be inserted yet"
    rows.end(first)
    rows.end(second)
    assert (rows.kv.block_pool.used, rows.kv.used, rows.run([*PROMPT, 5, 5, 6]).computed) == (3, 0, 12)


def test_dropped_revision_is_not_found_and_frees_on_release() -> None:
    rows = Rows()
    rows.run(PROMPT, ONE)
    rows.plan()
    runs = rows.admit(ask([*PROMPT, 1, 2]), OTHER)
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
    runs = rows.admit(ask(PROMPT), ONE)
    rows.compute(runs)
    rows.plan()
    waits = ask([*PROMPT, 1, 2])
    assert rows.kv.can_allocate(waits, ONE, 0)
    rows.kv.drop_revision("r1")
    assert rows.admit(waits, ONE).computed == 0
    again = ask([*PROMPT, 3])
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
    """Tokens generated in one request are prompt tokens in another, so the same tokens have two invocation offsets."""
    rows = Rows()
    rows.run(LONG_PROMPT, ONE, invocation_start=5)
    assert rows.run(LONG_PROMPT, ONE, invocation_start=6).computed == 4
    assert rows.run(LONG_PROMPT, ONE, invocation_start=9).computed == 4
    assert rows.run(LONG_PROMPT, ONE).computed == 0, "a LoRA that acts from the first token shares none of them"
    assert [rows.run(LONG_PROMPT, ONE, invocation_start=at).computed for at in (5, 6, 9)] == [16, 16, 16]


def test_dropped_alora_inserts_only_pages_before_its_invocation() -> None:
    rows = Rows(pages=32)
    rows.plan()
    before, after = (rows.admit(ask([*LONG_PROMPT, tail], invocation_start=9), ONE) for tail in (1, 2))
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


def test_pages_do_not_outlive_their_row_without_reuse() -> None:
    rows = Rows(reuse=False)
    for _ in range(2):
        assert rows.run(PROMPT).computed == 0
        assert rows.kv.block_pool.used == len(rows.tree) == 0


def test_partial_audit_reaches_every_page() -> None:
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


def test_audit_finds_a_row_with_foreign_pages() -> None:
    rows = Rows()
    rows.plan()
    request = rows.admit(ask(PROMPT))
    rows.compute(request)
    request.tokens[0] = 0
    with pytest.raises(AssertionError, match="other tokens"):
        rows.kv.audit(rows.running)
    request.tokens[0], request.cache_salt = PROMPT[0], "else"
    with pytest.raises(AssertionError, match="another cache_salt"):
        rows.kv.audit(rows.running)
