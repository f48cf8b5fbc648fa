"""The KV cache of the running set: pages for rows, and prefixes that are found again. Knows no queues, lanes or steps.

    request    tokens  p0 ........................................ p(P-1)
               pages   [shared][shared] | [own][own][own, not full]        shared pages are read, never written
                       ^ the tree's      ^ from here on it computes: at least the last known token

A page enters the tree as soon as it is full, its tokens are known and the step that writes it is planned; later steps
may read it, for the runner executes in order, but not that step itself. Rows that compute the same page at the same
time keep their own: the first is the tree's, and the others enter theirs when they end, as far as theirs are new.
What is before the invocation of an activated adapter is the base's, and so are the pages that are full there.
A page in the tree has one reference by the tree and one by every row that reads it; what no row reads is free to go.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from scheduler.kv_cache.block_pool import BlockPool
from scheduler.kv_cache.radix_cache import RadixCache, page_keys
from scheduler.requests.request import Request
from scheduler.types import BASE_OWNER, Node, Owner, Stem


class KvCacheManager:
    """BlockPool, and the tree over them; `reuse` False: no page outlives its row."""

    def __init__(self, pages: int, page_size: int, reuse: bool = True) -> None:
        self.tree = RadixCache()
        self.evictions = 0
        self._reuse = reuse
        self.reset(pages, page_size)

    def reset(self, pages: int, page_size: int) -> None:
        """A new runner: nothing is in any page, and no request holds a node any more."""
        self.pages = BlockPool(pages)
        self.tree.clear()
        self._size = page_size
        self._step = 0

    @property
    def free(self) -> int:
        """How many pages can be granted now."""
        return self.pages.free + self.tree.idle

    @property
    def used(self) -> int:
        """How many pages rows hold."""
        return self.pages.used - self.tree.idle

    # ------------------------------------------------------------------------------------------------- who comes in

    def begin(self, step: int) -> None:
        """Step `step` is being planned: what it writes it cannot read."""
        self._step = step

    def admits(self, request: Request, owner: Owner, reserve: int) -> bool:
        """Whether a waiting request gets pages for all its tokens now, and `reserve` more are left.

        Not now, either, if this very step computes at least half of what it would have to: the next one shares it.
        """
        need = self._needs(request)
        if need - self._limit(request) + reserve > self.free:
            return False  # even with the best prefix
        node, coming = self._match(request, owner)
        if coming and 2 * coming * self._size >= len(request.tokens) - self._depth(node) * self._size:
            return False
        return need - self._depth(node) + reserve <= self.free - _idle_on(node)

    def admit(self, request: Request, owner: Owner) -> None:
        """BlockPool for all known tokens, those of its prefix shared; `computed` says how many tokens they hold."""
        node, _ = self._match(request, owner)
        if self._reuse:
            request.prefix = node = node or self.tree.top(_trunk(request, owner), request.cache_salt)
            self.tree.hold(node)
            if request.invoked_at is not None:
                request.branch = self.tree.join(owner, request.cache_salt)
        shared = [each.page for each in node.path()] if node is not None else []
        self.pages.share(shared)
        request.pages = shared + self._grant(self._needs(request) - len(shared))
        request.computed = len(shared) * self._size

    def grow(self, request: Request) -> list[int]:
        """One page more, which must be free."""
        pages = self._grant(1)
        request.pages += pages
        return pages

    # ------------------------------------------------------------------------------------------- what is found again

    def computed(self, request: Request) -> None:
        """The step being planned computes more of a running row: its full pages can be found, by later steps."""
        self._enter(request, self._step, through=False)

    def learnt(self, request: Request) -> None:
        """A running row's next token is known, so what is before it was computed."""
        if (len(request.tokens) - 1) % self._size == 0:
            self._enter(request, 0, through=False)

    def release(self, request: Request) -> None:
        """Takes a row's pages; those that are full and known can be found until they are needed."""
        node = self._enter(request, 0, through=True)
        if node is not None:
            self.pages.release(self.tree.release(node))
        if request.branch is not None:
            self.tree.leave(request.branch)
            request.branch = None
        self.pages.release(request.pages)
        request.pages = []

    def drop(self, revision: str) -> None:
        """No page of this revision, or of a mix with it, is found again."""
        self.pages.release(self.tree.drop(revision))

    def audit(self, running: Sequence[Request], at_most: int | None = None) -> None:
        """Proves every reference to a page, and that a row holds the path of its own pages and tokens.

        With more than `at_most` pages: that the sums are right, and as many nodes of the tree as that, in turn.
        """
        held = Counter(request.prefix for request in running if request.prefix is not None)
        branching = Counter(request.branch for request in running if request.branch is not None)
        self.tree.audit(held, at_most, branching)
        if at_most is not None and self.pages.count > at_most:
            self.pages.audit_sums(sum(len(request.pages) for request in running) + len(self.tree))
            return
        self.pages.audit([page for request in running for page in request.pages] + list(self.tree.pages()))
        for request in running:
            assert (request.prefix is not None) == self._reuse, f"request {request.id} holds a path, or none"
            branches = self._reuse and request.invoked_at is not None
            assert (request.branch is not None) == branches, f"request {request.id} holds a branch, or none"
            if request.prefix is not None:
                self._audit_path(request, request.prefix)

    # ----------------------------------------------------------------------------------------------------- private

    def _needs(self, request: Request) -> int:
        return -(-len(request.tokens) // self._size)

    def _limit(self, request: Request) -> int:
        """How many pages it may take from the tree: a token is left to compute, and every one that is to be scored."""
        if not self._reuse:
            return 0
        most = len(request.tokens) - 1
        return (most if request.scored >= request.to_score else min(most, request.scored)) // self._size

    @staticmethod
    def _depth(node: Node | None) -> int:
        return node.depth if node is not None else 0

    def _match(self, request: Request, owner: Owner) -> tuple[Node | None, int]:
        """The end of its longest prefix (None: no stem), and how many pages more the step being planned computes.

        Where it was found before is remembered: a request that waits at the head costs no second walk.
        """
        limit = self._limit(request)
        node = self._start(request, owner)
        if node is None:
            return None, 0
        while node.depth > limit:
            assert node.parent is not None
            node = node.parent
        last, coming = node, 0
        branch = self.tree.branching(owner, request.cache_salt)
        for key in self._keys(request, branch, node.depth, limit):
            child = node.children.get(key)
            if child is None:
                break
            node = child
            if coming or child.step == self._step:
                coming += 1
            else:
                last = child
        request.prefix = last
        return last, coming

    def _start(self, request: Request, owner: Owner) -> Node | None:
        """The last of its nodes that is in the tree still, else the top of its stem."""
        if not self._reuse:
            return None
        node = request.prefix
        while node is not None and not node.alive:
            node = node.parent
        trunk = _trunk(request, owner)
        if node is None or node.stem.dropped or node.stem.owner not in (trunk, owner):
            return self.tree.find(trunk, request.cache_salt)
        return node

    def _keys(self, request: Request, branch: Stem | None, begin: int, end: int) -> Iterator[bytes]:
        """What its pages number `begin` to `end` - 1 are found by; no further than the base's without `branch`."""
        keys = page_keys(request.tokens, self._size, begin, end)
        if request.invoked_at is None:
            yield from keys
            return
        first, offset = divmod(request.invoked_at, self._size)
        for index, key in enumerate(keys, begin):
            if index != first:
                yield key
            elif branch is not None:
                yield branch.key(key, offset)
            else:
                return

    def _enter(self, request: Request, step: int, through: bool) -> Node | None:
        """Walks on from its node over full, known pages. `through` nodes that others entered with pages of theirs."""
        node = request.prefix
        if node is None or node.stem.dropped:
            return node
        full = min(request.computed, len(request.tokens)) // self._size
        branch = None if request.branch is None or request.branch.dropped else request.branch
        for key in self._keys(request, branch, node.depth, full):
            page = request.pages[node.depth]
            child = node.children.get(key)
            if child is None:
                self.pages.share([page])
                begins = node.depth * self._size <= request.acts_from < (node.depth + 1) * self._size
                node = self.tree.grow(node, key, page, step, branch if begins else None)
            elif through:
                self.tree.hold(child)
                self.tree.release(node)
                node = child
            else:
                break
        request.prefix = node
        return node

    def _grant(self, count: int) -> list[int]:
        while self.pages.free < count:
            self.pages.release([self.tree.evict()])
            self.evictions += 1
        return self.pages.grant(count)

    def _audit_path(self, request: Request, prefix: Node) -> None:
        path = prefix.path()
        assert [node.page for node in path] == request.pages[: len(path)], f"request {request.id} holds others' pages"
        keys = list(self._keys(request, request.branch, 0, len(path)))
        assert [node.key for node in path] == keys, f"request {request.id} holds another's tokens"
        assert len(path) * self._size <= request.computed, f"request {request.id} holds what it did not compute"
        assert prefix.stem.cache_salt == request.cache_salt, f"request {request.id} holds another tenant's pages"


def _trunk(request: Request, owner: Owner) -> Owner:
    """Whose its first page is: the base's, where its adapter acts from the invocation on."""
    return owner if request.invoked_at is None else BASE_OWNER


def _idle_on(node: Node | None) -> int:
    """How many nodes of a path nobody holds: they are free no more when it is taken."""
    count = 0
    while node is not None and not node.holds and node.page:
        count, node = count + 1, node.parent
    return count
