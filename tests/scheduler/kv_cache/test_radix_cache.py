"""scheduler.kv_cache.radix_cache: what is found, what stays, and who goes first, by hand and against a slow model."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.kv_cache.radix_cache import RadixCache, page_keys
from scheduler.types import Node, Owner

ONE: Owner = (("r1", 1.0),)
MIX: Owner = (("r1", 0.5), ("r2", 0.5))


def _grow(tree: RadixCache, owner: Owner, keys: bytes, first: int, cache_salt: str = "") -> Node:
    """A path of one page a byte, numbered from `first` on, with one holder at its end."""
    node = tree.top(owner, cache_salt)
    tree.hold(node)
    for offset, key in enumerate(keys):
        node = tree.grow(node, bytes([key]), first + offset)
    return node


def test_page_keys_tell_tokens_apart() -> None:
    tokens = [*range(300), 70000, 0, 0]
    one_by_one = [key for page in range(151) for key in page_keys(tokens, 2, page, page + 1)]
    assert list(page_keys(tokens, 2, 0, 151)) == one_by_one
    assert list(page_keys(tokens, 2, 3, 3)) == []
    assert len(set(one_by_one)) == 151
    assert {len(key) for key in one_by_one} == {8}


def test_a_path_is_found_below_its_owner_and_salt_only() -> None:
    tree = RadixCache()
    end = _grow(tree, ONE, b"ab", 1, "t")
    assert [node.page for node in end.path()] == [1, 2]
    top = tree.find(ONE, "t")
    assert top is not None
    assert top.children[b"a"].children[b"b"] is end
    assert tree.find(ONE, "") is tree.find(MIX, "t") is tree.find((), "t") is None
    tree.audit({end: 1})


def test_the_longest_unused_leaf_goes_first_and_never_what_is_held() -> None:
    tree = RadixCache()
    first, second, held = _grow(tree, (), b"ab", 1), _grow(tree, ONE, b"a", 3), _grow(tree, (), b"c", 4)
    assert tree.release(first) == tree.release(second) == []
    tree.hold(first)
    tree.release(first)  # used again: after `second`
    tree.audit({held: 1})
    assert [tree.idle, tree.evict(), tree.evict(), tree.evict(), tree.idle] == [3, 3, 2, 1, 0]
    assert not first.alive
    assert tree.find(ONE, "") is None
    tree.audit({held: 1})


def test_a_holder_keeps_all_above_and_nothing_below() -> None:
    tree = RadixCache()
    end = _grow(tree, (), b"abc", 1)
    middle = end.path()[1]
    tree.hold(middle)
    tree.release(end)
    tree.audit({middle: 1})
    assert (tree.idle, tree.evict(), tree.idle) == (1, 3, 0)


def test_an_empty_stem_is_forgotten() -> None:
    tree = RadixCache()
    top = tree.top((), "")
    tree.hold(top)
    assert tree.find((), "") is top
    tree.release(top)
    assert tree.find((), "") is None
    assert not top.alive
    tree.audit({})


def test_dropping_a_revision_takes_its_mixes_too_and_waits_for_holders() -> None:
    tree = RadixCache()
    alone, mixed, base = _grow(tree, ONE, b"ab", 1), _grow(tree, MIX, b"ab", 3), _grow(tree, (), b"a", 5)
    tree.release(alone)
    assert tree.drop("r1") == [2, 1]
    tree.audit({mixed: 1, base: 1})
    assert tree.find(MIX, "") is None
    assert sorted(tree.pages()) == [3, 4, 5]
    again = _grow(tree, MIX, b"a", 6)
    assert tree.release(mixed) == [4, 3]
    tree.audit({again: 1, base: 1})
    assert sorted(tree.pages()) == [5, 6]


def _branch(tree: RadixCache, parent: Node, page: int, owner: Owner = ONE) -> Node:
    """A page of an activated adapter below one of the base's, with its first holder; the stem has one too."""
    stem = tree.join(owner, parent.stem.cache_salt)
    tree.hold(parent)
    return tree.grow(parent, stem.key(b"a", 1), page, branch=stem)


def test_a_branch_leaves_the_bases_pages_and_is_known_by_where_it_begins_too() -> None:
    tree = RadixCache()
    base = _grow(tree, (), b"ab", 1, "t")
    first = _branch(tree, base, 3)
    stem = first.stem
    assert [node.page for node in first.path()] == [1, 2, 3]
    assert (stem.owner, stem.cache_salt, tree.branching(ONE, "t")) == (ONE, "t", stem)
    assert tree.branching(MIX, "t") is tree.branching(ONE, "") is tree.find(ONE, "t") is None
    assert len({stem.key(b"a", 1), stem.key(b"a", 2), stem.key(b"b", 1), tree.join(MIX, "t").key(b"a", 1), b"a"}) == 5
    second = tree.grow(first, b"c", 4)
    assert second.stem is stem
    tree.leave(stem)
    tree.audit({base: 1, second: 1}, branching={stem: 0, **{s: 1 for s in [tree.branching(MIX, "t")] if s}})
    assert tree.release(second) == []
    assert [tree.evict(), tree.evict()] == [4, 3]
    assert tree.branching(ONE, "t") is None, "no page and no holder"
    assert base.alive


def test_dropping_a_revision_takes_its_branches_and_leaves_the_base() -> None:
    tree = RadixCache()
    base = _grow(tree, (), b"ab", 1)
    idle, held = _branch(tree, base, 3), _branch(tree, base.path()[0], 4)
    stem = held.stem
    assert idle.stem is stem
    tree.release(idle)
    tree.release(base)
    assert tree.drop("r1") == [3]
    assert (stem.dropped, tree.branching(ONE, ""), held.alive) == (True, None, True)
    tree.audit({held: 1}, branching={stem: 2})
    again = _branch(tree, base.path()[0], 5)
    assert again.key != held.key, "who comes later finds nothing of it"
    assert tree.release(held) == [4]
    tree.leave(stem)
    tree.leave(stem)
    tree.audit({again: 1}, branching={again.stem: 1})
    assert sorted(tree.pages()) == [1, 2, 5]


def test_misuse_is_seen() -> None:
    tree = RadixCache()
    end = _grow(tree, (), b"ab", 1)
    with pytest.raises(AssertionError, match="counts 1 holds"):
        tree.audit({})
    with pytest.raises(AssertionError, match="is there already"):
        tree.grow(end.path()[0], b"b", 9)
    tree.release(end)
    with pytest.raises(AssertionError, match="nobody holds"):
        tree.grow(end, b"c", 9)
    with pytest.raises(AssertionError, match="once too often"):
        tree.release(end)


@dataclass
class Model:
    """The same by definition: paths with the time of their last use; the tree is their set of prefixes."""

    held: list[tuple[Owner, bytes]] = field(default_factory=list)
    used: dict[tuple[Owner, bytes], int] = field(default_factory=dict)  # idle or held, by path
    clock: int = 0

    def is_held(self, owner: Owner, keys: bytes) -> bool:
        return any(other == owner and held.startswith(keys) for other, held in self.held)

    def idle(self) -> list[tuple[Owner, bytes]]:
        return sorted((path for path in self.used if not self.is_held(*path)), key=lambda path: self.used[path])


MOVES = st.tuples(
    st.sampled_from(["use", "use", "end", "end", "evict", "drop"]),
    st.sampled_from([(), ONE, MIX]),
    st.binary(max_size=4).map(lambda keys: bytes(key % 2 for key in keys)),
    st.integers(0, 3),
)


@settings(derandomize=True, max_examples=150, deadline=None)
@given(st.lists(MOVES, max_size=40))
def test_any_history_is_that_of_the_model(moves: list[tuple[str, Owner, bytes, int]]) -> None:
    tree, model, ends, names = RadixCache(), Model(), list[Node](), dict[int, tuple[Owner, bytes]]()
    for what, owner, keys, number in moves:
        if what == "use":
            node = tree.top(owner, "")
            tree.hold(node)
            for length, key in enumerate(keys, start=1):
                child = node.children.get(bytes([key]))
                if child is None:
                    page = next(p for p in range(1, 1000) if p not in names)
                    names[page] = owner, keys[:length]
                    model.used[owner, keys[:length]] = 0
                    node = tree.grow(node, bytes([key]), page)
                else:
                    tree.hold(child)
                    assert tree.release(node) == []
                    node = child
            ends.append(node)
            model.held.append((owner, keys))
        elif what == "end" and ends:
            node, (owner, keys) = ends.pop(number % len(ends)), model.held.pop(number % len(model.held))
            assert tree.release(node) == []
            free = [length for length in range(len(keys), 0, -1) if not model.is_held(owner, keys[:length])]
            for length in free:
                model.clock += 1
                model.used[owner, keys[:length]] = model.clock
        elif what == "evict" and tree.idle:
            path = names.pop(tree.evict())
            assert path == model.idle()[0]
            del model.used[path]
        elif what == "drop" and not ends:
            gone = {names.pop(page) for page in tree.drop("r1")}
            assert gone == {path for path in model.used if path[0] in (ONE, MIX)}
            model.used = {path: at for path, at in model.used.items() if path not in gone}
        assert tree.idle == len(model.idle())
        assert {names[page] for page in tree.pages()} == set(model.used)
        tree.audit(Counter(ends))
