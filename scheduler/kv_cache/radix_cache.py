"""The radix tree of KV pages: which full page holds which tokens. Does not depend on requests or on the block pool.

    root of (owner, cache_salt) --tokens of page 0--> node --tokens of page 1--> node ...      each node is one page
                                                          \\--other tokens--> node

A page is found by its owner, its cache_salt and all tokens up to its end, so it holds the keys and values of exactly
these tokens. The owner is the model that computed the page: adapter revisions with their scales, () for the base model.

Before its invocation an activated LoRA (aLoRA) is the base model, so its pages are children of the base model's pages.
The key of an aLoRA's first page also contains the aLoRA's number and the invocation's offset in the page:

    root of ((), cache_salt) --page 0--> node --page 1--> node --page 2--> node ...
                                                              \\--page 2, number, offset--> node --page 3--> node ...

A running request holds the last node of its path, which also holds all nodes above. A node without holds is evictable.
Evictable nodes are in order of last use, a child always before its parent: the first is the least recently used leaf.

    holds    by a row:   1        evictable: n4, n3 (its parent), n2      a row ends: its path is added, last node first
             by a child: 1                   ^ evicted first              a row holds n3: n3 is removed, n4 stays
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from itertools import count

from scheduler.kv_cache import radix_audit
from scheduler.types import Namespace, Node, Owner


class RadixCache:
    """The radix tree: all nodes, by namespace, and the order of eviction."""

    def __init__(self) -> None:
        self._roots: dict[tuple[Owner, str], Node] = {}
        self._aloras: dict[tuple[Owner, str], Namespace] = {}
        self._numbers = count(1)
        self._dropped: dict[Node, None] = {}  # roots of dropped namespaces that have holders
        self._evictable: OrderedDict[Node, None] = OrderedDict()
        self._count = 0
        self._unaudited: list[Node] = []  # nodes that the next partial audits check

    def __len__(self) -> int:
        return self._count

    @property
    def evictable(self) -> int:
        """The number of pages without a holder."""
        return len(self._evictable)

    def find_root(self, owner: Owner, cache_salt: str) -> Node | None:
        """Returns the root of a namespace, or None if the namespace has neither pages nor holders."""
        return self._roots.get((owner, cache_salt))

    def open_root(self, owner: Owner, cache_salt: str) -> Node:
        """Returns the root of a namespace, created if necessary; it is removed when it has no pages and no holders."""
        node = self._roots.get((owner, cache_salt))
        if node is None:
            node = self._roots[owner, cache_salt] = Node(Namespace(owner, cache_salt), None)
        return node

    def find_alora(self, owner: Owner, cache_salt: str) -> Namespace | None:
        """Returns the namespace of an activated LoRA, or None if it has neither pages nor holders."""
        return self._aloras.get((owner, cache_salt))

    def hold_alora(self, owner: Owner, cache_salt: str) -> Namespace:
        """Adds a holder to the namespace of an activated LoRA, which is created if necessary, and returns it."""
        namespace = self._aloras.get((owner, cache_salt))
        if namespace is None:
            namespace = Namespace(owner, cache_salt, number=next(self._numbers))
            self._aloras[owner, cache_salt] = namespace
        namespace.holders += 1
        return namespace

    def release_alora(self, namespace: Namespace) -> None:
        """Removes a holder of an activated LoRA's namespace."""
        namespace.holders -= 1
        assert namespace.holders >= 0, "a namespace is released once too often"
        self._forget_alora(namespace)

    @staticmethod
    def match_prefix(node: Node, keys: Iterable[bytes], step: int) -> tuple[Node, int]:
        """Walks down from `node` along `keys`.

        Returns the last node whose page is computed before step `step`, and how many nodes after it that step computes.
        """
        last, planned = node, 0
        for key in keys:
            child = node.children.get(key)
            if child is None:
                break
            node = child
            if planned or child.step == step:
                planned += 1
            else:
                last = child
        return last, planned

    def insert(self, parent: Node, key: bytes, page: int, step: int = 0, alora: Namespace | None = None) -> Node:
        """Inserts a page below `parent` and returns its node. The caller's hold moves from `parent` to the new node.

        With `alora`, the page is the first one of that namespace on this path.
        """
        assert parent.holds, "a page is inserted below a node that is not held"
        assert key not in parent.children, "the page is already in the tree"
        node = Node(alora or parent.namespace, parent, key, page, parent.depth + 1, step, holds=1)
        parent.children[key] = node  # `parent.holds` stays: the held child's hold replaces the caller's
        if alora is not None:
            alora.first_pages[node] = None
        self._count += 1
        return node

    def hold(self, node: Node) -> None:
        """Adds a holder to the node, so that neither it nor any node above can be evicted."""
        assert node.alive, "a node that has left the tree cannot be held"
        above: Node | None = node
        while above is not None:
            above.holds += 1
            if above.holds > 1:
                return
            self._evictable.pop(above, None)
            above = above.parent

    def release(self, node: Node) -> list[int]:
        """Removes a holder from the node; nodes of the path without holds become evictable.

        In a dropped namespace, nodes without holds are removed. Returns the pages of the removed nodes.
        """
        removed: list[int] = []
        below: Node | None = node
        while below is not None:
            below.holds -= 1
            assert below.holds >= 0, "a node is released once too often"
            if below.holds:
                break
            parent = below.parent
            if parent is None:
                self._close_root(below)
            elif below.namespace.dropped:
                removed.append(self._remove(below))
            else:
                self._evictable[below] = None
            below = parent
        return removed

    def evict(self) -> int:
        """Removes the least recently used evictable page and returns it; there must be one."""
        node, _ = self._evictable.popitem(last=False)
        assert not node.children, "a page is evicted before its children"
        return self._remove(node)

    def drop_revision(self, revision: str) -> list[int]:
        """Drops the namespaces of all owners that contain this revision, and removes their pages without a holder.

        Returns the removed pages. Pages that are held stay until `release` removes them, but no lookup finds them.
        """
        removed: list[int] = []
        for name in _names_with(revision, self._roots):
            root = self._roots.pop(name)
            root.namespace.dropped = True
            self._dropped[root] = None
            removed += self._prune(_below(root))
            self._close_root(root)
        for name in _names_with(revision, self._aloras):
            namespace = self._aloras.pop(name)
            namespace.dropped = True
            for node in list(namespace.first_pages):
                removed += self._prune([node, *_below(node)])
        return removed

    def clear(self) -> None:
        """Removes every node and breaks its reference cycles: the process runs without the cyclic garbage collector."""
        for node in self._nodes():
            node.alive, node.parent = False, None
            node.children.clear()
            node.namespace.first_pages.clear()
        self._roots.clear()
        self._aloras.clear()
        self._dropped.clear()
        self._evictable.clear()
        self._unaudited.clear()
        self._count = 0

    def pages(self) -> Iterator[int]:
        """Yields every page in the tree."""
        return (node.page for node in self._nodes() if node.page)

    def audit(
        self, holders: Mapping[Node, int], at_most: int | None = None, aloras: Mapping[Namespace, int] | None = None
    ) -> None:
        """Asserts that the hold counts match `holders` and `aloras`, and that children are evicted before parents.

        `holders` and `aloras` are the number of requests that hold each node and each aLoRA's namespace. With more than
        `at_most` pages, only the next `at_most` nodes are checked, and not the order of eviction.
        """
        radix_audit.check_aloras(self._aloras, aloras or {})
        if at_most is None or self._count <= at_most:
            self._audit_all(holders)
        else:
            self._audit_some(holders, at_most)

    # ----------------------------------------------------------------------------------------------------- private

    def _audit_some(self, holders: Mapping[Node, int], at_most: int) -> None:
        if not self._unaudited:
            self._unaudited = [*self._roots.values(), *self._dropped]
        while self._unaudited and at_most:
            node, at_most = self._unaudited.pop(), at_most - 1
            if node.alive:
                radix_audit.check_node(node, holders.get(node, 0))
                self._unaudited += node.children.values()

    def _audit_all(self, holders: Mapping[Node, int]) -> None:
        nodes = self._nodes()
        assert self._count == sum(node.page > 0 for node in nodes), "the count of pages is wrong"
        assert holders.keys() <= set(nodes), "a node is held that is not in the tree"
        radix_audit.check_roots(self._roots)
        for node in nodes:
            radix_audit.check_node(node, holders.get(node, 0))
        radix_audit.check_evictable(nodes, self._evictable)

    def _remove(self, node: Node) -> int:
        parent = node.parent
        assert parent is not None
        del parent.children[node.key]
        node.alive = False
        self._count -= 1
        if node.namespace is not parent.namespace:
            del node.namespace.first_pages[node]
            self._forget_alora(node.namespace)
        if parent.parent is None:
            self._close_root(parent)
        return node.page

    def _forget_alora(self, namespace: Namespace) -> None:
        """Removes an activated LoRA's namespace if it has neither pages nor holders."""
        if not (namespace.first_pages or namespace.holders or namespace.dropped):
            del self._aloras[namespace.owner, namespace.cache_salt]

    def _close_root(self, root: Node) -> None:
        """Removes a root if it has neither pages nor holders."""
        if root.children or root.holds or not root.alive:
            return
        root.alive = False
        if root.namespace.dropped:
            del self._dropped[root]
        else:
            del self._roots[root.namespace.owner, root.namespace.cache_salt]

    def _prune(self, nodes: list[Node]) -> list[int]:
        """Removes the nodes without a holder and returns their pages. `nodes` must have parents before children."""
        unheld = [node for node in nodes if not node.holds]
        for node in unheld:
            del self._evictable[node]
        return [self._remove(node) for node in reversed(unheld)]

    def _nodes(self) -> list[Node]:
        """Returns all nodes, including the roots."""
        return [node for root in (*self._roots.values(), *self._dropped) for node in (root, *_below(root))]


def _names_with(revision: str, names: Mapping[tuple[Owner, str], object]) -> list[tuple[Owner, str]]:
    return [name for name in names if any(part == revision for part, _ in name[0])]


def _below(node: Node) -> list[Node]:
    """Returns all nodes below this one, parents before children."""
    found = list(node.children.values())
    for each in found:
        found += each.children.values()
    return found
