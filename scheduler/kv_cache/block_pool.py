"""The KV page allocator: pages 1..count, each with a number of references. Knows nothing of tokens or of who refers.

Page 0 is never granted: padding writes there. A page is granted with one reference, shared by more, and free again
when the last one is released. Reuse needs no waiting for steps in flight: the runner executes steps strictly in order,
so a page granted again is written by a later step than the last one of its former owner (see scheduler.core).
"""

from __future__ import annotations

from collections.abc import Iterable


class BlockPool:
    """Free list and reference counts."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = list(range(count, 0, -1))  # popped from the end: low numbers first, the last released first
        self._references = [0] * (count + 1)

    @property
    def free(self) -> int:
        """How many pages can be granted now."""
        return len(self._free)

    @property
    def used(self) -> int:
        """How many pages have a reference."""
        return self.count - len(self._free)

    def grant(self, count: int) -> list[int]:
        """`count` pages with one reference each; there must be that many."""
        assert count <= len(self._free), f"{count} pages asked, {len(self._free)} free"
        granted = [self._free.pop() for _ in range(count)]
        for page in granted:
            self._references[page] = 1
        return granted

    def share(self, pages: Iterable[int]) -> None:
        """One more reference to pages that have one."""
        for page in pages:
            assert self._references[page] > 0, f"page {page} is free and cannot be shared"
            self._references[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """One reference less; the last one frees the page."""
        for page in pages:
            left = self._references[page] - 1
            assert left >= 0, f"page {page} is released once too often"
            self._references[page] = left
            if left == 0:
                self._free.append(page)

    def audit_sums(self, held: int) -> None:
        """Proves that there are as many references as `held`, and that every page has one or is free."""
        assert sum(self._references) == held, f"{sum(self._references)} references, and {held} holders"
        assert self._references.count(0) - 1 == len(self._free), "a page is neither free nor held"

    def audit(self, held: Iterable[int]) -> None:
        """Proves that `held`, every reference anywhere, and the free list account for every page."""
        expected = [0] * (self.count + 1)
        for page in held:
            assert 1 <= page <= self.count, f"page {page} is held and does not exist"
            expected[page] += 1
        wrong = [page for page, count in enumerate(expected) if count != self._references[page]]
        assert not wrong, f"pages {wrong[:8]} have other references than holders"
        assert len(set(self._free)) == len(self._free), "a page is twice in the free list"
        assert not any(expected[page] for page in self._free), "a page is free and held"
        assert len(self._free) == expected.count(0) - 1, "a page is neither free nor held"
