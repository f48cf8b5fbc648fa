"""scheduler.kv_cache.radix_cache: lookups, holds and order of eviction, in scripted cases and against a slow model."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.kv_cache.page_keys import page_keys
from scheduler.kv_cache.radix_cache import RadixCache
from scheduler.types import Node, Owner

ONE: Owner = (("r1", 1.0),)
MIX: Owner = (("r1", 0.5), ("r2", 0.5))


def _insert_path(tree: RadixCache, owner: Owner, keys: bytes, first: int, cache_salt: str = "") -> Node:
    """Inserts a path with one page per byte of `keys`, numbered from `first`. Returns its last node, held once."""
    node = tree.open_root(owner, cache_salt)
    tree.hold(node)
    for offset, key in enumerate(keys):
        node = tree.insert(node, bytes([key]), first + offset)
    return node


def test_page_keys_differ_where_tokens_differ() -> None:
    tokens = [*range(300), 70000, 0, 0]
    one_by_one = [key for page in range(151) for key in page_keys(tokens, 2, page, page + 1)]
    assert list(page_keys(tokens, 2, 0, 151)) == one_by_one
    assert list(page_keys(tokens, 2, 3, 3)) == []
    assert len(set(one_by_one)) == 151
    assert {len(key) for key in one_by_one} == {8}


def test_path_is_found_only_by_its_owner_and_cache_salt() -> None:
    tree = RadixCache()
    end = _insert_path(tree, ONE, b"ab", 1, "t")
    assert [node.page for node in end.path()] == [1, 2]
    root = tree.find_root(ONE, "t")
    assert root is not None
    assert root.children[b"a"].children[b"b"] is end
    assert tree.find_root(ONE, "") is tree.find_root(MIX, "t") is tree.find_root((), "t") is None
    tree.audit({end: 1})


def test_least_recently_used_unheld_leaf_is_evicted_first() -> None:
    tree = RadixCache()
    first, second, held = (
        _insert_path(tree, (), b"ab", 1),
        _insert_path(tree, ONE, b"a", 3),
        _insert_path(tree, (), b"c", 4),
    )
    assert tree.release(first) == tree.release(second) == []
    tree.hold(first)
    tree.release(first)  # `first` is used again, after `second`
    tree.audit({held: 1})
    assert [tree.evictable, tree.evict(), tree.evict(), tree.evict(), tree.evictable] == [3, 3, 2, 1, 0]
    assert not first.alive
    assert tree.find_root(ONE, "") is None
    tree.audit({held: 1})


def test_holder_keeps_the_nodes_above_and_not_below() -> None:
    tree = RadixCache()
    end = _insert_path(tree, (), b"abc", 1)
    middle = end.path()[1]
    tree.hold(middle)
    tree.release(end)
    tree.audit({middle: 1})
    assert (tree.evictable, tree.evict(), tree.evictable) == (1, 3, 0)


def test_empty_root_is_removed() -> None:
    tree = RadixCache()
    root = tree.open_root((), "")
    tree.hold(root)
    assert tree.find_root((), "") is root
    tree.release(root)
    assert tree.find_root((), "") is None
    assert not root.alive
    tree.audit({})


def test_dropped_revision_takes_its_mixes_and_waits_for_holders() -> None:
    tree = RadixCache()
    alone, mixed, base = (
        _insert_path(tree, ONE, b"ab", 1),
        _insert_path(tree, MIX, b"ab", 3),
        _insert_path(tree, (), b"a", 5),
    )
    tree.release(alone)
    assert tree.drop_revision("r1") == [2, 1]
    tree.audit({mixed: 1, base: 1})
    assert tree.find_root(MIX, "") is None
    assert sorted(tree.pages()) == [3, 4, 5]
    again = _insert_path(tree, MIX, b"a", 6)
    assert tree.release(mixed) == [4, 3]
    tree.audit({again: 1, base: 1})
    assert sorted(tree.pages()) == [5, 6]


def _insert_alora(tree: RadixCache, parent: Node, page: int, owner: Owner = ONE) -> Node:
    """Inserts an aLoRA's first page below a page of the base model. Its node and its namespace have one holder each."""
    namespace = tree.hold_alora(owner, parent.namespace.cache_salt)
    tree.hold(parent)
    return tree.insert(parent, namespace.first_key(b"a", 1), page, alora=namespace)


def test_alora_hangs_below_the_base_and_is_keyed_by_its_offset() -> None:
    tree = RadixCache()
    base = _insert_path(tree, (), b"ab", 1, "t")
    first = _insert_alora(tree, base, 3)
    namespace = first.namespace
    assert [node.page for node in first.path()] == [1, 2, 3]
    assert (namespace.owner, namespace.cache_salt, tree.find_alora(ONE, "t")) == (ONE, "t", namespace)
    assert tree.find_alora(MIX, "t") is tree.find_alora(ONE, "") is tree.find_root(ONE, "t") is None
    other = tree.hold_alora(MIX, "t")
    keys = [namespace.first_key(b"a", 1), namespace.first_key(b"a", 2), namespace.first_key(b"b", 1)]
    assert len({*keys, other.first_key(b"a", 1), b"a"}) == 5
    second = tree.insert(first, b"c", 4)
    assert second.namespace is namespace
    tree.release_alora(namespace)
    tree.audit({base: 1, second: 1}, aloras={namespace: 0, other: 1})
    assert tree.release(second) == []
    assert [tree.evict(), tree.evict()] == [4, 3]
    assert tree.find_alora(ONE, "t") is None, "it has neither pages nor holders"
    assert base.alive


def test_dropped_alora_leaves_the_pages_of_the_base() -> None:
    tree = RadixCache()
    base = _insert_path(tree, (), b"ab", 1)
    unheld, held = _insert_alora(tree, base, 3), _insert_alora(tree, base.path()[0], 4)
    namespace = held.namespace
    assert unheld.namespace is namespace
    tree.release(unheld)
    tree.release(base)
    assert tree.drop_revision("r1") == [3]
    assert (namespace.dropped, tree.find_alora(ONE, ""), held.alive) == (True, None, True)
    tree.audit({held: 1}, aloras={namespace: 2})
    again = _insert_alora(tree, base.path()[0], 5)
    assert again.key != held.key, "a later request finds none of the dropped pages"
    assert tree.release(held) == [4]
    tree.release_alora(namespace)
    tree.release_alora(namespace)
    tree.audit({again: 1}, aloras={again.namespace: 1})
    assert sorted(tree.pages()) == [1, 2, 5]


def test_tree_refuses_misuse() -> None:
    tree = RadixCache()
    end = _insert_path(tree, (), b"ab", 1)
    with pytest.raises(AssertionError, match="counts 1 holds"):
        tree.audit({})
    with pytest.raises(AssertionError, match="already in the tree"):
        tree.insert(end.path()[0], b"b", 9)
    tree.release(end)
    with pytest.raises(AssertionError, match="is not held"):
        tree.insert(end, b"c", 9)
    with pytest.raises(AssertionError, match="once too often"):
        tree.release(end)


@dataclass
class Model:
    """A slow model of the tree: the paths that are held, and the last use of each node (a prefix of a path)."""

    held: list[tuple[Owner, bytes]] = field(default_factory=list)
    used: dict[tuple[Owner, bytes], int] = field(default_factory=dict)  # last use of each node, by its path
    clock: int = 0

    def is_held(self, owner: Owner, keys: bytes) -> bool:
        return any(other == owner and held.startswith(keys) for other, held in self.held)

    def evictable(self) -> list[tuple[Owner, bytes]]:
        return sorted((path for path in self.used if not self.is_held(*path)), key=lambda path: self.used[path])


MOVES = st.tuples(
    st.sampled_from(["use", "use", "end", "end", "evict", "drop"]),
    st.sampled_from([(), ONE, MIX]),
    st.binary(max_size=4).map(lambda keys: bytes(key % 2 for key in keys)),
    st.integers(0, 3),
)


@settings(derandomize=True, max_examples=150, deadline=None)
@given(st.lists(MOVES, max_size=40))
def test_tree_equals_the_model_after_any_history(moves: list[tuple[str, Owner, bytes, int]]) -> None:
    tree, model, ends, names = RadixCache(), Model(), list[Node](), dict[int, tuple[Owner, bytes]]()
    for what, owner, keys, number in moves:
        if what == "use":
            node = tree.open_root(owner, "")
            tree.hold(node)
            for length, key in enumerate(keys, start=1):
                child = node.children.get(bytes([key]))
                if child is None:
                    page = next(p for p in range(1, 1000) if p not in names)
                    names[page] = owner, keys[:length]
                    model.used[owner, keys[:length]] = 0
                    node = tree.insert(node, bytes([key]), page)
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
        elif what == "evict" and tree.evictable:
            path = names.pop(tree.evict())
            assert path == model.evictable()[0]
            del model.used[path]
        elif what == "drop" and not ends:
            gone = {names.pop(page) for page in tree.drop_revision("r1")}
            assert gone == {path for path in model.used if path[0] in (ONE, MIX)}
            model.used = {path: at for path, at in model.used.items() if path not in gone}
        assert tree.evictable == len(model.evictable())
        assert {names[page] for page in tree.pages()} == set(model.used)
        tree.audit(Counter(ends))
