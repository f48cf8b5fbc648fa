"""How many rank pages copies need, and which copies a runner can never hold, whichever pages are free."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from engine.messages import Capacity
from scheduler.adapters.copies import AdapterCopy


def pages_needed(copies: Iterable[AdapterCopy]) -> dict[str, int]:
    """Returns by group how many rank pages all these copies need together; groups with none are left out."""
    total: dict[str, int] = {}
    for copy in copies:
        for group, count in copy.pages_needed.items():
            if count:
                total[group] = total.get(group, 0) + count
    return total


def limit_error(copies: Sequence[AdapterCopy], capacity: Capacity) -> str | None:
    """Returns why these copies can never be in one lane (by what is known of them now), or None if they can."""
    for copy in copies:
        if copy.error is not None:
            return copy.error
    for group, count in pages_needed(copies).items():
        available = capacity.rank_pages.get(group, 0)
        if count > available:
            return (
                f"the adapter needs {count} LoRA rank pages of group {group}, but there are {available}; "
                "raise --max-lora-rank or widen --lora-target-modules"
            )
        if count > capacity.max_lane_pages:
            return (
                f"the adapter or mix is {count} rank pages long in group {group}, but a lane holds at most "
                f"{capacity.max_lane_pages}; mix fewer adapters or raise --max-lora-rank"
            )
    return None


def never_fits(copies: Sequence[AdapterCopy], pinned: Iterable[AdapterCopy], capacity: Capacity) -> str | None:
    """Returns why these copies find no pages even if every copy that is not pinned is evicted, or None if they do."""
    wanted = {copy.id for copy in copies}
    pinned_here = [copy for copy in pinned if copy.on_device and copy.id not in wanted]
    for group, count in pages_needed([*copies, *pinned_here]).items():
        if count > capacity.rank_pages.get(group, 0):
            return f"the adapter does not fit beside the pinned ones (LoRA rank pages of group {group}); unpin one"
    return None
