"""Pages of the base, of adapters, and of adapters that act from an invocation on, in any order of what can happen.

Each slot of a page remembers all tokens up to its own, and who computed it: the base, or an owner as of how many drops.
Whatever a request is given must be what it would have computed itself.
"""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from engine.messages import Sampling, Stopping
from scheduler.kv_cache.kv_cache_manager import KvCacheManager
from scheduler.requests.request import Request
from scheduler.types import BASE, Owner

PAGE = 2
ONE: Owner = (("r1", 1.0),)
HALF: Owner = (("r1", 0.5),)
TWO: Owner = (("r2", 1.0),)

Slot = tuple[tuple[int, ...], str, str]  # tokens, who computed it, tenant


class Branches(RuleBasedStateMachine):
    """Few tokens, so that prompts are alike; where an invocation begins is drawn, as generated ones do not count."""

    @initialize(pages=st.sampled_from([9, 40]))
    def start(self, pages: int) -> None:
        self.kv = KvCacheManager(pages, PAGE)
        self.running: list[tuple[Request, Owner, int]] = []  # and how often its revision was dropped before
        self.drops = {"r1": 0, "r2": 0}
        self.slots: dict[int, list[Slot]] = {}
        self.step = self.last = 0

    @rule(
        last=st.integers(0, 1),
        length=st.integers(3, 9),
        owner=st.sampled_from([(), ONE, ONE, ONE, HALF, TWO]),
        invoked=st.sampled_from([None, 0, 1, 2, 3, 4, 5]),
        cache_salt=st.sampled_from(["", "", "", "t"]),
        part=st.sampled_from([1, 3, 9]),
    )
    def admit(self, last: int, length: int, owner: Owner, invoked: int | None, cache_salt: str, part: int) -> None:
        self.last += 1
        tokens = [0] * (length - 1) + [last]
        request = Request(
            self.last, BASE, (0, self.last), len(tokens), tokens, Sampling(), Stopping(9), cache_salt=cache_salt
        )
        if owner and invoked is not None:
            request.invoked_at = min(invoked, len(tokens) - 1)
        self.step += 1
        self.kv.begin(self.step)
        if not self.kv.admits(request, owner, len(self.running)):
            return
        self.kv.admit(request, owner)
        drops = self.drops[owner[0][0]] if owner else 0
        shared = request.computed // PAGE
        for index, page in enumerate(request.pages[:shared]):
            assert self.slots[page] == self._slots(request, owner, drops, index), f"page {index} is another's"
        for page in request.pages[shared:]:
            self.slots[page] = []
        self.running.append((request, owner, drops))
        self._compute(self.running[-1], min(len(tokens), request.computed + part))

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 9))
    def go_on(self, which: int) -> None:
        entry = self.running[which % len(self.running)]
        self.step += 1
        self.kv.begin(self.step)
        self._compute(entry, len(entry[0].tokens))

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 9), token=st.integers(0, 1))
    def generate(self, which: int, token: int) -> None:
        request = self.running[which % len(self.running)][0]
        if request.computed < len(request.tokens) or (
            request.computed == len(request.pages) * PAGE and not self.kv.free
        ):
            return
        request.tokens.append(token)
        self.kv.learnt(request)
        if request.computed == len(request.pages) * PAGE:
            self.slots[self.kv.grow(request)[0]] = []
        request.computed += 1
        self._write(self.running[which % len(self.running)])
        self._audit()

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 9))
    def end(self, which: int) -> None:
        request, _, _ = self.running.pop(which % len(self.running))
        self.kv.release(request)
        self._audit()

    @rule(revision=st.sampled_from(["r1", "r2"]))
    def drop(self, revision: str) -> None:
        self.kv.drop(revision)
        self.drops[revision] += 1
        self._audit()

    def _compute(self, entry: tuple[Request, Owner, int], end: int) -> None:
        request = entry[0]
        request.computed = max(request.computed, end)
        self.kv.computed(request)
        self._write(entry)
        self._audit()

    def _write(self, entry: tuple[Request, Owner, int]) -> None:
        """All that it computed is in its own pages; those that it shares had it."""
        request, owner, drops = entry
        for index, page in enumerate(request.pages):
            held = self._slots(request, owner, drops, index)
            assert self.slots[page] == held[: len(self.slots[page])], "a page of others is written"
            self.slots[page] = held

    def _slots(self, request: Request, owner: Owner, drops: int, index: int) -> list[Slot]:
        own = f"{owner} after {drops}" if owner else "base"
        known = min(request.computed, len(request.tokens))
        return [
            (tuple(request.tokens[: at + 1]), own if at >= request.acts_from else "base", request.cache_salt)
            for at in range(index * PAGE, min(known, (index + 1) * PAGE))
        ]

    def _audit(self) -> None:
        self.kv.audit([request for request, _, _ in self.running])

    def teardown(self) -> None:
        """Nothing is held in the end, and everything can be dropped."""
        if not hasattr(self, "kv"):
            return
        while self.running:
            self.end(0)
        assert self.kv.used == 0
        self.drop("r1")
        self.drop("r2")
        self.kv.pages.release([self.kv.tree.evict() for _ in range(self.kv.tree.idle)])
        assert (len(self.kv.tree), self.kv.pages.used) == (0, 0)
        assert not self.kv.tree._tops
        assert not self.kv.tree._branching


TestBranches = Branches.TestCase
TestBranches.settings = settings(derandomize=True, max_examples=120, stateful_step_count=40, deadline=None)
