"""The KV pages of requests: allocation, and prefixes found in the radix tree. Knows no queues, lanes or steps.

    request    tokens  p0 ........................................ p(P-1)
               pages   [shared][shared] | [own][own][own, not full]        shared pages are read, never written
                       ^ in the tree    ^ computed by this request: at least the last known token

A page is inserted into the tree as soon as it is full, its tokens are known and the step that writes it is planned.
Later steps may read it, because the runner executes steps in order; that step itself may not. Rows that compute the
same page at the same time keep their own: the first is inserted, and the others insert what is new when they end.
Pages that are full before the invocation of an activated LoRA are the base model's.
A page in the tree has one reference by the tree and one by each row that reads it; without a row it can be evicted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from scheduler.kv_cache.block_pool import BlockPool
from scheduler.kv_cache.page_keys import request_page_keys
from scheduler.kv_cache.radix_cache import RadixCache
from scheduler.requests.request import Request
from scheduler.types import BASE_OWNER, Node, Owner


class KvCacheManager:
    """The block pool and the radix tree over it. With `reuse` False no page outlives its row."""

    def __init__(self, pages: int, page_size: int, reuse: bool = True) -> None:
        self.radix_cache = RadixCache()
        self.evictions = 0
        self._reuse = reuse
        self.reset(pages, page_size)

    def reset(self, pages: int, page_size: int) -> None:
        """Starts empty for a new runner. The requests must have forgotten their nodes and pages."""
        self.block_pool = BlockPool(pages)
        self.radix_cache.clear()
        self._page_size = page_size
        self._step = 0

    @property
    def free(self) -> int:
        """How many pages can be allocated, by eviction if need be."""
        return self.block_pool.free + self.radix_cache.evictable

    @property
    def used(self) -> int:
        """How many pages rows hold."""
        return self.block_pool.used - self.radix_cache.evictable

    # -------------------------------------------------------------------------------------------------- allocation

    def begin_step(self, step: int) -> None:
        """Step `step` is being planned: pages that it writes cannot be shared in it."""
        self._step = step

    def can_allocate(self, request: Request, owner: Owner, reserve: int) -> bool:
        """Whether a waiting request can have pages for all its tokens, with `reserve` pages left over.

        False also if the step being planned computes at least half of what the request lacks: the next step shares it.
        """
        need = self._pages_for(request)
        if need - self._most_shared(request) + reserve > self.free:
            return False  # even with the longest prefix
        node, coming = self._match(request, owner)
        if coming and 2 * coming * self._page_size >= len(request.tokens) - _depth(node) * self._page_size:
            return False
        return need - _depth(node) + reserve <= self.free - _unheld_on_path(node)

    def allocate(self, request: Request, owner: Owner) -> None:
        """Gives the request pages for all known tokens, its prefix shared, and sets `computed` to the shared tokens."""
        node, _ = self._match(request, owner)
        if self._reuse:
            request.prefix = node = node or self.radix_cache.open_root(_root_owner(request, owner), request.cache_salt)
            self.radix_cache.hold(node)
            if request.invocation_start is not None:
                request.alora = self.radix_cache.hold_alora(owner, request.cache_salt)
        shared = [each.page for each in node.path()] if node is not None else []
        self.block_pool.share(shared)
        request.pages = shared + self._allocate(self._pages_for(request) - len(shared))
        request.computed = len(shared) * self._page_size

    def append_page(self, request: Request) -> list[int]:
        """Gives a running row one more page, which must be free."""
        pages = self._allocate(1)
        request.pages += pages
        return pages

    # ------------------------------------------------------------------------------------------------------- reuse

    def chunk_planned(self, request: Request) -> None:
        """The step being planned computes more of a running row: later steps can share the pages that it fills."""
        self._insert(request, self._step, through=False)

    def token_known(self, request: Request) -> None:
        """A running row's next token is known, so all positions before it are computed."""
        if (len(request.tokens) - 1) % self._page_size == 0:
            self._insert(request, 0, through=False)

    def release(self, request: Request) -> None:
        """Takes a row's pages back; full pages with known tokens stay in the tree until they are evicted."""
        node = self._insert(request, 0, through=True)
        if node is not None:
            self.block_pool.release(self.radix_cache.release(node))
        if request.alora is not None:
            self.radix_cache.release_alora(request.alora)
            request.alora = None
        self.block_pool.release(request.pages)
        request.pages = []

    def drop_revision(self, revision: str) -> None:
        """No page of this revision, or of a mix with it, is found again."""
        self.block_pool.release(self.radix_cache.drop_revision(revision))

    def audit(self, running: Sequence[Request], at_most: int | None = None) -> None:
        """Asserts every reference to a page, and that a row holds the path of its own pages and tokens.

        With more than `at_most` pages: only that the sums are right, and the next `at_most` nodes of the tree.
        """
        held = Counter(request.prefix for request in running if request.prefix is not None)
        aloras = Counter(request.alora for request in running if request.alora is not None)
        self.radix_cache.audit(held, at_most, aloras)
        if at_most is not None and self.block_pool.count > at_most:
            self.block_pool.audit_sums(sum(len(request.pages) for request in running) + len(self.radix_cache))
            return
        in_tree = list(self.radix_cache.pages())
        self.block_pool.audit([page for request in running for page in request.pages] + in_tree)
        for request in running:
            self._audit_request(request)

    # ----------------------------------------------------------------------------------------------------- private

    def _pages_for(self, request: Request) -> int:
        return -(-len(request.tokens) // self._page_size)

    def _most_shared(self, request: Request) -> int:
        """How many pages the request may share: it computes its last token, and every position to be scored."""
        if not self._reuse:
            return 0
        most = len(request.tokens) - 1
        return (most if request.scored >= request.to_score else min(most, request.scored)) // self._page_size

    def _match(self, request: Request, owner: Owner) -> tuple[Node | None, int]:
        """(the last node of its longest prefix, or None; how many further pages the step being planned computes).

        The node is kept in `request.prefix`, so that a request at the head of the queue is not walked twice.
        """
        limit = self._most_shared(request)
        node = self._match_start(request, owner)
        if node is None:
            return None, 0
        while node.depth > limit:
            assert node.parent is not None
            node = node.parent
        alora = self.radix_cache.find_alora(owner, request.cache_salt)
        keys = request_page_keys(request, alora, self._page_size, node.depth, limit)
        request.prefix, planned = self.radix_cache.match_prefix(node, keys, self._step)
        return request.prefix, planned

    def _match_start(self, request: Request, owner: Owner) -> Node | None:
        """The node that was found before, or its first ancestor that is still in the tree; else the root, if any."""
        if not self._reuse:
            return None
        node = request.prefix
        while node is not None and not node.alive:
            node = node.parent
        root_owner = _root_owner(request, owner)
        if node is None or node.namespace.dropped or node.namespace.owner not in (root_owner, owner):
            return self.radix_cache.find_root(root_owner, request.cache_salt)
        return node

    def _insert(self, request: Request, step: int, through: bool) -> Node | None:
        """Walks on from its node over its full, known pages and inserts those that are not in the tree.

        At a page that is there already the walk ends, or with `through` goes on below that one.
        """
        node = request.prefix
        if node is None or node.namespace.dropped:
            return node
        full = min(request.computed, len(request.tokens)) // self._page_size
        alora = None if request.alora is None or request.alora.dropped else request.alora
        for key in request_page_keys(request, alora, self._page_size, node.depth, full):
            page = request.pages[node.depth]
            child = node.children.get(key)
            if child is None:
                self.block_pool.share([page])
                first = node.depth * self._page_size <= request.acts_from < (node.depth + 1) * self._page_size
                node = self.radix_cache.insert(node, key, page, step, alora if first else None)
            elif through:
                self.radix_cache.hold(child)
                self.radix_cache.release(node)
                node = child
            else:
                break
        request.prefix = node
        return node

    def _allocate(self, count: int) -> list[int]:
        while self.block_pool.free < count:
            self.block_pool.release([self.radix_cache.evict()])
            self.evictions += 1
        return self.block_pool.allocate(count)

    def _audit_request(self, request: Request) -> None:
        number, prefix = request.id, request.prefix
        assert (prefix is not None) == self._reuse, f"request {number} holds a path, or none"
        activated = self._reuse and request.invocation_start is not None
        assert (request.alora is not None) == activated, f"request {number} holds an aLoRA's namespace, or none"
        if prefix is None:
            return
        path = prefix.path()
        pages = [node.page for node in path]
        assert pages == request.pages[: len(path)], f"request {number} holds the path of other pages"
        keys = list(request_page_keys(request, request.alora, self._page_size, 0, len(path)))
        assert [node.key for node in path] == keys, f"request {number} holds the path of other tokens"
        assert len(path) * self._page_size <= request.computed, f"request {number} holds pages it did not compute"
        assert prefix.namespace.cache_salt == request.cache_salt, f"request {number} holds pages of another cache_salt"


def _root_owner(request: Request, owner: Owner) -> Owner:
    """The owner of its first page: with an activated LoRA the base model."""
    return owner if request.invocation_start is None else BASE_OWNER


def _depth(node: Node | None) -> int:
    return node.depth if node is not None else 0


def _unheld_on_path(node: Node | None) -> int:
    """How many nodes of a path can be evicted now, and no more once the path is held."""
    count = 0
    while node is not None and not node.holds and node.page:
        count, node = count + 1, node.parent
    return count
