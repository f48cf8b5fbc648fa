"""Assertions about the nodes of the radix tree, for tests and the periodic audit. Changes nothing."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from scheduler.types import BASE_OWNER, Namespace, Node, Owner


def check_aloras(aloras: Mapping[tuple[Owner, str], Namespace], holders: Mapping[Namespace, int]) -> None:
    """Asserts that each namespace of an activated LoRA has the right key, a page or holder, and the right holder count.

    `holders` is the number of requests that hold each namespace.
    """
    for (owner, cache_salt), namespace in aloras.items():
        _check_name(namespace, owner, cache_salt)
        assert namespace.holders or namespace.first_pages, f"the namespace of {owner} is empty"
    for namespace in {*aloras.values(), *holders}:
        expected = holders.get(namespace, 0)
        assert namespace.holders == expected, f"the namespace of {namespace.owner} counts {namespace.holders} holders"
        assert all(node.alive for node in namespace.first_pages), f"{namespace.owner} has a first page out of the tree"


def check_roots(roots: Mapping[tuple[Owner, str], Node]) -> None:
    """Asserts that the key of each root is the owner and cache_salt of its namespace."""
    for (owner, cache_salt), root in roots.items():
        _check_name(root.namespace, owner, cache_salt)


def check_node(node: Node, holders: int) -> None:
    """Asserts that a node's hold count is right and that it fits its parent. `holders`: the requests that hold it."""
    held = 0
    for child in node.children.values():
        held += child.holds > 0
    assert node.alive, f"page {node.page} is in the tree and marked as removed"
    assert node.holds == holders + held, f"page {node.page} counts {node.holds} holds, not {holders} + {held}"
    if node.parent is None:
        assert (node.page, node.depth) == (0, 0), "a root has a page"
        assert node.children or node.holds, f"the namespace of {node.namespace.owner} is empty"
    else:
        _check_below(node, node.parent)


def check_evictable(nodes: Iterable[Node], evictable: Collection[Node]) -> None:
    """Asserts that `evictable` has exactly the nodes without holds, each child before its parent."""
    index = {node: number for number, node in enumerate(evictable)}
    unheld = {node for node in nodes if node.page and not node.holds}
    assert index.keys() == unheld, "the evictable pages are not those without a holder"
    for node, number in index.items():
        assert node.parent not in unheld or index[node.parent] > number, f"page {node.page} goes after its parent"


def _check_name(namespace: Namespace, owner: Owner, cache_salt: str) -> None:
    found = namespace.owner, namespace.cache_salt, namespace.dropped
    assert found == (owner, cache_salt, False), f"a namespace is listed as {owner}"


def _check_below(node: Node, parent: Node) -> None:
    assert node.page > 0, "a node has no page"
    assert parent.children[node.key] is node, f"page {node.page} is not its parent's child"
    space, above = node.namespace, parent.namespace
    assert (space is not above) == (node in space.first_pages), f"page {node.page} is of another namespace"
    joins = space is above or (above.owner == BASE_OWNER and space.cache_salt == above.cache_salt)
    assert joins, f"page {node.page} hangs below a page that it may not use"
    assert node.depth == parent.depth + 1, f"page {node.page} is at depth {node.depth}"
