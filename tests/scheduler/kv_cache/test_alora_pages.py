"""KV pages of the base model, of LoRAs and of activated LoRAs, under any order of events.

Each slot of a page records all tokens up to its position, its cache_salt, and what computed it: the base, or an owner
with the number of drops of its revision before. The pages that a request shares must hold exactly what it would have
computed itself.
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

Slot = tuple[tuple[int, ...], str, str]  # (tokens, what computed it, cache_salt)


class AnyOrder(RuleBasedStateMachine):
    """A state machine that admits, computes and ends requests and drops revisions, in any order.

    Prompts have few different tokens, so that they share prefixes. Invocation positions are drawn at random.
    """

    @initialize(pages=st.sampled_from([9, 40]))
    def start(self, pages: int) -> None:
        self.kv = KvCacheManager(pages, PAGE)
        self.running: list[tuple[Request, Owner, int]] = []  # (request, owner, drops of its revision before)
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
            request.invocation_start = min(invoked, len(tokens) - 1)
        self.step += 1
        self.kv.begin_step(self.step)
        if not self.kv.can_allocate(request, owner, len(self.running)):
            return
        self.kv.allocate(request, owner)
        drops = self.drops[owner[0][0]] if owner else 0
        shared = request.computed // PAGE
        for index, page in enumerate(request.pages[:shared]):
            assert self.slots[page] == self._slots(request, owner, drops, index), f"page {index} holds something else"
        for page in request.pages[shared:]:
            self.slots[page] = []
        self.running.append((request, owner, drops))
        self._compute(self.running[-1], min(len(tokens), request.computed + part))

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 9))
    def compute_rest(self, which: int) -> None:
        entry = self.running[which % len(self.running)]
        self.step += 1
        self.kv.begin_step(self.step)
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
        self.kv.token_known(request)
        if request.computed == len(request.pages) * PAGE:
            self.slots[self.kv.append_page(request)[0]] = []
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
        self.kv.drop_revision(revision)
        self.drops[revision] += 1
        self._audit()

    def _compute(self, entry: tuple[Request, Owner, int], end: int) -> None:
        request = entry[0]
        request.computed = max(request.computed, end)
        self.kv.chunk_planned(request)
        self._write(entry)
        self._audit()

    def _write(self, entry: tuple[Request, Owner, int]) -> None:
        """Records what the request has computed in its pages, and checks that nothing else was in them."""
        request, owner, drops = entry
        for index, page in enumerate(request.pages):
            held = self._slots(request, owner, drops, index)
            assert self.slots[page] == held[: len(self.slots[page])], "a page of another request is overwritten"
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
        """Ends all requests; asserts that no page is held then, and that all pages can be dropped or evicted."""
        if not hasattr(self, "kv"):
            return
        while self.running:
            self.end(0)
        assert self.kv.used == 0
        self.drop("r1")
        self.drop("r2")
        tree = self.kv.radix_cache
        self.kv.block_pool.release([tree.evict() for _ in range(tree.evictable)])
        assert (len(tree), self.kv.block_pool.used) == (0, 0)
        names = [(owner, salt) for owner in ((), ONE, HALF, TWO) for salt in ("", "t")]
        assert not any(tree.find_root(*name) or tree.find_alora(*name) for name in names)


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(derandomize=True, max_examples=120, stateful_step_count=40, deadline=None)
