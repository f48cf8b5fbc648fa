"""Chooses which copies are evicted from the device, and in which order. Changes no copy.

A resident copy in no lane that is not pinned is idle: its pages may be granted to other copies. An idle copy is wanted
if a request or a preload needs it, and spare otherwise. Spare copies are evicted first, in the order of the policy
(lru, fifo), then wanted copies, beginning with the one whose first request is last in the queue. A wanted copy is
evicted only for a request that comes before the first request that needs the copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import chain

from scheduler.adapters.copies import AdapterCopy, DeviceState
from scheduler.adapters.stamp_order import Policy, StampOrder
from scheduler.types import Order

WantedOrder = Callable[[AdapterCopy], Order | None]
"""Returns the order of the first request or preload that needs a copy. When it changes, `reclassify` must be called."""


def is_idle(copy: AdapterCopy) -> bool:
    """Returns whether the copy may be evicted from the device: resident, in no lane, and not pinned."""
    return copy.device.state is DeviceState.RESIDENT and not copy.device.lanes and not copy.pinned


class DeviceEviction:
    """The ids of the idle copies of a device cache, in the order of eviction."""

    def __init__(self, policy: Policy, wanted_order: WantedOrder) -> None:
        self._policy = policy
        self._wanted_order = wanted_order
        self._spare: StampOrder[int] = StampOrder()
        self._wanted: StampOrder[Order] = StampOrder()

    def reclassify(self, copy: AdapterCopy) -> None:
        """Updates whether the copy is listed as spare, as wanted or as neither, after it has changed."""
        idle = is_idle(copy)
        order = self._wanted_order(copy) if idle else None
        if order is not None:
            self._wanted.put(copy.id, order)
        else:
            self._wanted.drop(copy.id)
        if idle and order is None:
            self._spare.put(copy.id, copy.last_used if self._policy == "lru" else copy.device.filled_since)
        else:
            self._spare.drop(copy.id)

    def candidates(self) -> Iterator[int]:
        """Iterates over the ids of all idle copies."""
        return chain(self._spare, self._wanted)

    def choose_victims(
        self, lacking: dict[str, int], keep: set[int], order: Order, on_device: Mapping[int, AdapterCopy]
    ) -> list[AdapterCopy]:
        """Returns the copies to evict so that `lacking` pages by group become free for a request or preload at `order`.

        Copies whose ids are in `keep` are not evicted. Returns [] if all that may be evicted are not enough.
        """
        victims: list[AdapterCopy] = []
        for copy_id in chain(self._spare, self._wanted.above(order)):
            copy = on_device[copy_id]
            pages = copy.device.pages
            if copy.id in keep or not (pages.keys() & lacking.keys()):
                continue
            victims.append(copy)
            left = {group: count - len(pages.get(group, ())) for group, count in lacking.items()}
            lacking = {group: count for group, count in left.items() if count > 0}
            if not lacking:
                return victims
        return []

    def audit(self, copy: AdapterCopy, name: str) -> None:
        """Asserts that the copy is listed if and only if it is idle, and in the right order."""
        idle = is_idle(copy)
        assert idle == (copy.id in self._spare or copy.id in self._wanted), (
            f"{name} is idle, or listed so, but not both"
        )
        assert not idle or self._wanted.stamp(copy.id) == self._wanted_order(copy), f"{name} is listed in another order"
