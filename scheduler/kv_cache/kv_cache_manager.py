"""The KV pages of requests: allocation, and prefixes found in the radix tree. Does not depend on queues or lanes.

    request    tokens  p0 ........................................ p(P-1)
               pages   [shared][shared] | [own][own][own, not full]        shared pages are read, never written
                       ^ in the tree    ^ computed by this request: at least the last known token

A page is inserted into the tree as soon as it is full, its tokens are known and the step that writes it is planned.
Later steps may read the page, because the runner executes steps in order; the step that writes it may not. Rows that
compute the same page at the same time each keep their own copy: the first row's is inserted, and the other rows insert
the pages that are still missing in the tree when they end. Pages that end before the invocation of an activated LoRA
belong to the base model. A page in the tree has one reference by the tree and one by each row that reads it; without
such a row it can be evicted.
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
    """The block pool and the radix tree over it. With `reuse` False there is no prefix cache: rows share no pages."""

    def __init__(self, pages: int, page_size: int, reuse: bool = True) -> None:
        self.radix_cache = RadixCache()
        self.evictions = 0
        self._reuse = reuse
        self.reset(pages, page_size)

    def reset(self, pages: int, page_size: int) -> None:
        """Empties the pool and the tree for a new runner. All requests must have dropped their nodes and pages."""
        self.block_pool = BlockPool(pages)
        self.radix_cache.clear()
        self._page_size = page_size
        self._step = 0

    @property
    def free(self) -> int:
        """The number of pages that can be allocated, by eviction if necessary."""
        return self.block_pool.free + self.radix_cache.evictable

    @property
    def used(self) -> int:
        """The number of pages that rows hold."""
        return self.block_pool.used - self.radix_cache.evictable

    # -------------------------------------------------------------------------------------------------- allocation

    def begin_step(self, step: int) -> None:
        """Begins the planning of step `step`. Pages that this step writes cannot be shared within it."""
        self._step = step

    def can_allocate(self, request: Request, owner: Owner, reserve: int) -> bool:
        """Returns whether a waiting request can get pages for all its tokens, with `reserve` pages left over.

        Returns False also if the step being planned computes at least half of the tokens that the request lacks: the
        request can share their pages in the next step.
        """
        need = self._pages_for(request)
        if need - self._most_shared(request) + reserve > self.free:
            return False  # too few pages even with the longest prefix
        node, coming = self._match(request, owner)
        if coming and 2 * coming * self._page_size >= len(request.tokens) - _depth(node) * self._page_size:
            return False
        return need - _depth(node) + reserve <= self.free - _unheld_on_path(node)

    def allocate(self, request: Request, owner: Owner) -> None:
        """Gives the request pages for all known tokens, shared ones for its prefix.

        Sets `computed` to the length of this prefix.
        """
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
        """Gives a running request one more page and returns it in a list. A page must be free or evictable."""
        pages = self._allocate(1)
        request.pages += pages
        return pages

    # ------------------------------------------------------------------------------------------------------- reuse

    def chunk_planned(self, request: Request) -> None:
        """Inserts the pages that the step being planned fills for a running request: later steps can share them."""
        self._insert(request, self._step, through=False)

    def token_known(self, request: Request) -> None:
        """Inserts a page that is full now that a running request's next token is known; earlier ones are computed."""
        if (len(request.tokens) - 1) % self._page_size == 0:
            self._insert(request, 0, through=False)

    def release(self, request: Request) -> None:
        """Releases the pages of a request; full pages with known tokens stay in the tree until they are evicted."""
        node = self._insert(request, 0, through=True)
        if node is not None:
            self.block_pool.release(self.radix_cache.release(node))
        if request.alora is not None:
            self.radix_cache.release_alora(request.alora)
            request.alora = None
        self.block_pool.release(request.pages)
        request.pages = []

    def drop_revision(self, revision: str) -> None:
        """Drops the pages of this revision, and of mixes that contain it, from the prefix cache."""
        self.block_pool.release(self.radix_cache.drop_revision(revision))

    def audit(self, running: Sequence[Request], at_most: int | None = None) -> None:
        """Asserts that all reference counts are right, and that each request's path matches its pages and tokens.

        With more than `at_most` pages, checks only the total of the counts and the next `at_most` nodes of the tree.
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
        """Returns the most pages that a request may share: it computes its last token and all positions to score."""
        if not self._reuse:
            return 0
        most = len(request.tokens) - 1
        return (most if request.scored >= request.to_score else min(most, request.scored)) // self._page_size

    def _match(self, request: Request, owner: Owner) -> tuple[Node | None, int]:
        """Looks up the request's longest prefix in the tree.

        Returns its last node (or None), and the number of further pages that the step being planned computes. The node
        is kept in `request.prefix`, so that the next lookup for the same request begins there.
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
        """Returns where to start a lookup: the node found last, else its first ancestor in the tree, else the root."""
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
        """Walks from the request's node over its further full pages of known tokens, and inserts those not in the tree.

        The walk ends at a page that is already in the tree; with `through`, it goes on below that page.
        Returns the last node.
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
    """Returns the owner of the request's first page: the base model if the request uses an activated LoRA."""
    return owner if request.invocation_start is None else BASE_OWNER


def _depth(node: Node | None) -> int:
    return node.depth if node is not None else 0


def _unheld_on_path(node: Node | None) -> int:
    """Returns how many nodes on the path to `node` are evictable now; they are not once the path is held."""
    count = 0
    while node is not None and not node.holds and node.page:
        count, node = count + 1, node.parent
    return count
