"""The rank pages of every group: free, held, or cooling. Knows no adapter copies.

    free --grant--> held --release--> cooling --StepDone of the last step that named them--> free
                     ^------------- grant(early) -'

Background fills run beside the steps (on a side stream). So, unlike a KV page, a rank page must not be granted to a
background fill while a step in flight may read the page. A fill at once is part of its step, and the runner executes
steps in order: such a fill may be granted a cooling page `early`, because all steps that name the page come before it.

    step n      lane 3 reads page 7; its adapter's last request ends
    step n+1    fill at once: page 7 <- another adapter; lane 3 names page 7; forward
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

GroupPages = dict[str, list[int]]


class RankPages:
    """The free pages of each group, and the cooling pages, which become free when a step is done."""

    def __init__(self, counts: Mapping[str, int]) -> None:
        self.counts = dict(counts)
        self._free: GroupPages = {group: list(range(count - 1, -1, -1)) for group, count in counts.items()}
        self._cooling: list[tuple[int, GroupPages]] = []
        self._done = 0

    def available(self, with_cooling: bool = True) -> dict[str, int]:
        """Returns by group how many pages are free, or with `with_cooling` free or cooling."""
        have = {group: len(free) for group, free in self._free.items()}
        if with_cooling:
            for _, pages in self._cooling:
                for group, numbers in pages.items():
                    have[group] += len(numbers)
        return have

    def lacking(self, need: Mapping[str, int], with_cooling: bool = False) -> dict[str, int]:
        """Returns by group how many pages are missing for `need`; groups that have enough are left out."""
        have = self.available(with_cooling)
        return {group: count - have.get(group, 0) for group, count in need.items() if count > have.get(group, 0)}

    def grant(self, need: Mapping[str, int], early: bool = False) -> GroupPages:
        """Takes `need` pages by group, which must be available, and returns them. `early`: also takes cooling pages."""
        lacking = self.lacking(need)
        assert early or not lacking, f"rank pages {dict(need)} are needed, and {lacking} are lacking"
        for group, count in lacking.items():
            self._free_cooling(group, count)
        return {group: [self._free[group].pop() for _ in range(count)] for group, count in need.items() if count}

    def release(self, pages: GroupPages, last_step: int) -> None:
        """Gives `pages` back: they are free once step `last_step` is done, and cooling until then."""
        if last_step <= self._done:
            self._return(pages)
        elif pages:
            self._cooling.append((last_step, pages))

    def step_done(self, step: int) -> bool:
        """Frees the cooling pages that wait for a step up to `step`. Returns whether there were any."""
        self._done = step
        before = len(self._cooling)
        for last_step, pages in self._cooling:
            if last_step <= step:
                self._return(pages)
        self._cooling = [entry for entry in self._cooling if entry[0] > step]
        return len(self._cooling) < before

    def used(self) -> dict[str, int]:
        """Returns by group how many pages are not free."""
        return {group: self.counts[group] - len(free) for group, free in self._free.items()}

    def audit(self, held: Iterable[GroupPages]) -> None:
        """Asserts that each page of each group is listed exactly once: as free, as cooling or in `held`."""
        seen: GroupPages = {group: list(free) for group, free in self._free.items()}
        for pages in [*held, *(pages for _, pages in self._cooling)]:
            for group, numbers in pages.items():
                seen[group] += numbers
        for group, count in self.counts.items():
            assert sorted(seen[group]) == list(range(count)), f"rank pages of {group}: {sorted(seen[group])}"

    def _free_cooling(self, group: str, count: int) -> None:
        """Frees `count` of a group's cooling pages before their step is done."""
        for _, pages in self._cooling:
            taken = pages.get(group, [])[:count]
            if taken:
                pages[group] = pages[group][count:]
                self._free[group] += taken
                count -= len(taken)
        assert not count, f"rank pages of {group}: {count} are neither free nor cooling"

    def _return(self, pages: GroupPages) -> None:
        for group, numbers in pages.items():
            self._free[group] += numbers
