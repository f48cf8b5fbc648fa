"""The KV page allocator: pages 1 to `count`, each with a reference count. Knows no tokens, rows or radix tree.

Page 0 is never allocated, because padding writes there. A page is allocated with one reference, may get more, and is
free again when the last reference is released. A free page can be reused while steps are in flight: the runner executes
steps in order, so the new owner's first write comes after the former owner's last write (see scheduler.core).
"""

from __future__ import annotations

from collections.abc import Iterable


class BlockPool:
    """The free list and the reference counts of the pages 1 to `count`."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = list(range(count, 0, -1))  # popped from the end: at first low numbers, later the last released
        self._references = [0] * (count + 1)

    @property
    def free(self) -> int:
        """The number of pages without a reference."""
        return len(self._free)

    @property
    def used(self) -> int:
        """The number of pages with at least one reference."""
        return self.count - len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Allocates `count` pages with one reference each. The caller has checked that `count` pages are free."""
        assert count <= len(self._free), f"{count} pages asked, {len(self._free)} free"
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._references[page] = 1
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """Adds a reference to each page; each must have at least one already."""
        for page in pages:
            assert self._references[page] > 0, f"page {page} is free and cannot be shared"
            self._references[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Removes a reference from each page; a page without references is free."""
        for page in pages:
            left = self._references[page] - 1
            assert left >= 0, f"page {page} is released once too often"
            self._references[page] = left
            if left == 0:
                self._free.append(page)

    def audit_sums(self, held: int) -> None:
        """Asserts that there are `held` references in total, and as many free pages as pages without a reference."""
        assert sum(self._references) == held, f"{sum(self._references)} references, and {held} holders"
        assert self._references.count(0) - 1 == len(self._free), "a page is neither free nor held"

    def audit(self, held: Iterable[int]) -> None:
        """Asserts that the counts match `held` (one page number per reference), and that all other pages are free."""
        expected = [0] * (self.count + 1)
        for page in held:
            assert 1 <= page <= self.count, f"page {page} is held and does not exist"
            expected[page] += 1
        wrong = [page for page, count in enumerate(expected) if count != self._references[page]]
        assert not wrong, f"pages {wrong[:8]} have other references than holders"
        assert len(set(self._free)) == len(self._free), "a page is twice in the free list"
        assert not any(expected[page] for page in self._free), "a page is free and held"
        assert len(self._free) == expected.count(0) - 1, "a page is neither free nor held"
