"""The prefix tree: which full KV pages hold which tokens, for whom. Knows nothing of requests or of free pages.

    stem (owner, cache_salt) --tokens of page 0--> node --tokens of page 1--> node ...        every node is one page
                                                 \\--other tokens--> node

An adapter that acts from its invocation on leaves the base's pages where that stands: its stem is a branch there, and
what is before is everyone's. The first page of a branch is known by where in it the invocation begins, too:

    stem ((), cache_salt) --page 0--> node --page 1--> node --page 2--> node ...
                                                     \\--page 2, revision, offset--> node --page 3--> node ...

A page is found by its owner, its cache_salt and all tokens before and in it, so it holds the keys and values of exactly
those. An owner is the model that computed it: revisions with scales, () for the base.

Whoever uses a path holds its last node, and with it every node above. What nobody holds is idle, in the order of its
last use and a child always before its parent: the first of the idle ones is a leaf, and the first to go.

    holds    held by a row: 1        idle:   n4, n3 (its parent), n2       a row ends: its path enters from the end up
             held by a child: 1              ^ goes first                  a row takes n3: n3 leaves, n4 stays
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from itertools import count

from scheduler.types import BASE_OWNER, Node, Owner, Stem

KEYS_AT_ONCE = 32


def page_keys(tokens: Sequence[int], size: int, begin: int, end: int) -> Iterator[bytes]:
    """What the pages number `begin` to `end` - 1 of these tokens are found by, `size` tokens in each."""
    width = array("I").itemsize * size
    for first in range(begin, end, KEYS_AT_ONCE):
        data = array("I", tokens[first * size : min(end, first + KEYS_AT_ONCE) * size]).tobytes()
        for at in range(0, len(data), width):
            yield data[at : at + width]


class RadixCache:
    """All stems, and who goes first."""

    def __init__(self) -> None:
        self._tops: dict[tuple[Owner, str], Node] = {}
        self._branching: dict[tuple[Owner, str], Stem] = {}
        self._stems = count(1)
        self._dropped: dict[Node, None] = {}  # tops that are held still
        self._idle: OrderedDict[Node, None] = OrderedDict()
        self._count = 0
        self._unproved: list[Node] = []  # where the next partial audit goes on

    def __len__(self) -> int:
        return self._count

    @property
    def idle(self) -> int:
        """How many pages nobody holds: all of them could go."""
        return len(self._idle)

    def find(self, owner: Owner, cache_salt: str) -> Node | None:
        """The top of a stem that has pages or holders."""
        return self._tops.get((owner, cache_salt))

    def top(self, owner: Owner, cache_salt: str) -> Node:
        """The top of a stem, a new one if need be; it stays while it has pages or is held."""
        node = self._tops.get((owner, cache_salt))
        if node is None:
            node = self._tops[owner, cache_salt] = Node(Stem(owner, cache_salt), None)
        return node

    def branching(self, owner: Owner, cache_salt: str) -> Stem | None:
        """The stem of an activated adapter, if it has pages or holders."""
        return self._branching.get((owner, cache_salt))

    def join(self, owner: Owner, cache_salt: str) -> Stem:
        """The same with one holder more, a new one if need be."""
        stem = self._branching.get((owner, cache_salt))
        if stem is None:
            stem = self._branching[owner, cache_salt] = Stem(owner, cache_salt, number=next(self._stems))
        stem.holders += 1
        return stem

    def leave(self, stem: Stem) -> None:
        """One holder less."""
        stem.holders -= 1
        assert stem.holders >= 0, "a stem is left once too often"
        self._forget(stem)

    def grow(self, parent: Node, key: bytes, page: int, step: int = 0, branch: Stem | None = None) -> Node:
        """A new page under `parent`, whose caller's hold goes over to it; with `branch` the first one of that stem."""
        assert parent.holds, "a page grows under a node that nobody holds"
        assert key not in parent.children, "the page is there already"
        node = Node(branch or parent.stem, parent, key, page, parent.depth + 1, step, holds=1)
        parent.children[key] = node  # a holder of `parent` less, a held child more
        if branch is not None:
            branch.branches[node] = None
        self._count += 1
        return node

    def hold(self, node: Node) -> None:
        """One holder more: it and all above it stay."""
        assert node.alive, "a node that is gone cannot be held"
        above: Node | None = node
        while above is not None:
            above.holds += 1
            if above.holds > 1:
                return
            self._idle.pop(above, None)
            above = above.parent

    def release(self, node: Node) -> list[int]:
        """One holder less. What nobody holds becomes idle; the pages of a dropped stem are returned instead."""
        gone: list[int] = []
        below: Node | None = node
        while below is not None:
            below.holds -= 1
            assert below.holds >= 0, "a node is released once too often"
            if below.holds:
                break
            parent = below.parent
            if parent is None:
                self._close(below)
            elif below.stem.dropped:
                gone.append(self._remove(below))
            else:
                self._idle[below] = None
            below = parent
        return gone

    def evict(self) -> int:
        """Takes out the page that was unused for longest; there must be an idle one."""
        node, _ = self._idle.popitem(last=False)
        assert not node.children, "a page goes before those that follow it"
        return self._remove(node)

    def drop(self, revision: str) -> list[int]:
        """No page that this revision had a part in is found again. Returns the idle ones; the held follow."""
        gone: list[int] = []
        for name in [name for name in self._tops if any(part == revision for part, _ in name[0])]:
            top = self._tops.pop(name)
            top.stem.dropped = True
            self._dropped[top] = None
            gone += self._prune(_below(top))
            self._close(top)
        for name in [name for name in self._branching if any(part == revision for part, _ in name[0])]:
            stem = self._branching.pop(name)
            stem.dropped = True
            for branch in list(stem.branches):
                gone += self._prune([branch, *_below(branch)])
        return gone

    def clear(self) -> None:
        """Every node is gone, and none refers to another: thousands would wait for the collector of cycles."""
        for node in self._nodes():
            node.alive, node.parent = False, None
            node.children.clear()
            node.stem.branches.clear()
        self._tops.clear()
        self._branching.clear()
        self._dropped.clear()
        self._idle.clear()
        self._unproved.clear()
        self._count = 0

    def pages(self) -> Iterator[int]:
        """Every page that is in the tree."""
        return (node.page for node in self._nodes() if node.page)

    def audit(
        self, holders: Mapping[Node, int], at_most: int | None = None, branching: Mapping[Stem, int] | None = None
    ) -> None:
        """Proves counts, holds and the order of the idle ones; `holders` says who has how many, `branching` of stems.

        With more than `at_most` pages, only the nodes that are next in turn, each by itself.
        """
        self._audit_branching(branching or {})
        if at_most is None or self._count <= at_most:
            self._audit_all(holders)
        else:
            self._audit_some(holders, at_most)

    # ----------------------------------------------------------------------------------------------------- private

    def _audit_branching(self, holders: Mapping[Stem, int]) -> None:
        for (owner, cache_salt), stem in self._branching.items():
            assert (stem.owner, stem.cache_salt, stem.dropped) == (owner, cache_salt, False), "a stem has another name"
            assert stem.holders or stem.branches, f"the stem of {owner} is empty"
        for stem in {*self._branching.values(), *holders}:
            assert stem.holders == holders.get(stem, 0), f"the stem of {stem.owner} counts {stem.holders} holders"
            assert all(node.alive for node in stem.branches), f"the stem of {stem.owner} has a branch that is gone"

    def _audit_some(self, holders: Mapping[Node, int], most: int) -> None:
        if not self._unproved:
            self._unproved = [*self._tops.values(), *self._dropped]
        while self._unproved and most:
            node, most = self._unproved.pop(), most - 1
            if node.alive:
                self._audit_node(node, holders.get(node, 0))
                self._unproved += node.children.values()

    def _audit_all(self, holders: Mapping[Node, int]) -> None:
        nodes = self._nodes()
        assert self._count == sum(node.page > 0 for node in nodes), "the count is off"
        assert holders.keys() <= set(nodes), "a node is held that is not in the tree"
        for (owner, cache_salt), top in self._tops.items():
            assert (top.stem.owner, top.stem.cache_salt, top.stem.dropped) == (owner, cache_salt, False), (
                "a stem has another name"
            )
        for node in nodes:
            self._audit_node(node, holders.get(node, 0))
        place = {node: index for index, node in enumerate(self._idle)}
        idle = {node for node in nodes if node.page and not node.holds}
        assert place.keys() == idle, "others are idle than are listed"
        for node, index in place.items():
            assert node.parent not in idle or place[node.parent] > index, f"page {node.page} goes after its parent"

    # ----------------------------------------------------------------------------------------------------- private

    def _remove(self, node: Node) -> int:
        parent = node.parent
        assert parent is not None
        del parent.children[node.key]
        node.alive = False
        self._count -= 1
        if node.stem is not parent.stem:
            del node.stem.branches[node]
            self._forget(node.stem)
        if parent.parent is None:
            self._close(parent)
        return node.page

    def _forget(self, stem: Stem) -> None:
        """A stem without branches and holders is forgotten."""
        if not (stem.branches or stem.holders or stem.dropped):
            del self._branching[stem.owner, stem.cache_salt]

    def _close(self, top: Node) -> None:
        """The same for one that has a top, without pages and holders."""
        if top.children or top.holds or not top.alive:
            return
        top.alive = False
        if top.stem.dropped:
            del self._dropped[top]
        else:
            del self._tops[top.stem.owner, top.stem.cache_salt]

    def _prune(self, nodes: list[Node]) -> list[int]:
        """Takes out those that nobody holds, leaves first; `nodes` come parents first."""
        idle = [node for node in nodes if not node.holds]
        for node in idle:
            del self._idle[node]
        return [self._remove(node) for node in reversed(idle)]

    def _nodes(self) -> list[Node]:
        """All nodes, the tops too."""
        return [node for top in (*self._tops.values(), *self._dropped) for node in (top, *_below(top))]

    def _audit_node(self, node: Node, holders: int) -> None:
        held = 0
        for child in node.children.values():
            held += child.holds > 0
        assert node.alive, f"page {node.page} is gone and in the tree"
        assert node.holds == holders + held, f"page {node.page} counts {node.holds} holds, not {holders} + {held}"
        if node.parent is None:
            assert (node.page, node.depth) == (0, 0), "a top has a page"
            assert node.children or node.holds, f"the stem of {node.stem.owner} is empty"
        else:
            assert node.page > 0, "a node has no page"
            assert node.parent.children[node.key] is node, f"page {node.page} is not its parent's child"
            own = node.stem is node.parent.stem
            assert own != (node in node.stem.branches), f"page {node.page} is of another stem"
            joint = own or (
                node.parent.stem.owner == BASE_OWNER and node.stem.cache_salt == node.parent.stem.cache_salt
            )
            assert joint, f"page {node.page} branches off another's"
            assert node.depth == node.parent.depth + 1, f"page {node.page} is at depth {node.depth}"


def _below(node: Node) -> list[Node]:
    """All nodes below, parents before children."""
    found = list(node.children.values())
    for each in found:
        found += each.children.values()
    return found
