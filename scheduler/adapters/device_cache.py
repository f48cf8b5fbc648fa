"""Which copies hold rank pages. Knows nothing of requests, lanes, queues, or how a copy came to the host tier.

A user is a lane that names the copy. A resident copy without users is idle: its pages may go to others. It is spare
while nobody waits for it either, and wanted else. Grants are all or nothing for all copies of a key.

    on_device     FILLING | RESIDENT with users | pinned | wanted | spare
    make_room     takes spare ones in the order of the policy, then wanted ones, the latest wanted first
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain

from engine.messages import Capacity, Fill
from scheduler.adapters.copies import Copy, Device
from scheduler.adapters.eviction import EvictionOrder, Policy
from scheduler.adapters.rank_pages import RankPages
from scheduler.types import Order

WaitingOrder = Callable[[Copy], Order | None]
"""The place of the first who waits for a copy, if anyone does; whoever changes that says so by `rest`."""


class DeviceCache:
    """Copies by id while they hold rank pages."""

    def __init__(
        self, capacity: Capacity, policy: Policy, tick: Callable[[], int], waiting_order: WaitingOrder
    ) -> None:
        self._policy = policy
        self._tick = tick
        self._waiting_order = waiting_order
        self.reset(capacity)

    def reset(self, capacity: Capacity) -> None:
        """A new runner holds nothing."""
        self._capacity = capacity
        self.rank_pages = RankPages(capacity.rank_pages)
        self.on_device: dict[int, Copy] = {}
        self.filling = 0
        self.version = 0  # moves whenever a grant that failed might succeed
        self._spare: EvictionOrder[int] = EvictionOrder()
        self._wanted: EvictionOrder[Order] = EvictionOrder()

    @property
    def device(self) -> str:
        """What the runner computes on: cpu or cuda."""
        return self._capacity.device

    # ---------------------------------------------------------------------------------------------------- one copy

    def filled(self, copy: Copy) -> None:
        """The runner answered the fill: lanes may name its pages."""
        assert copy.device is Device.FILLING
        self.filling -= 1
        self._resident(copy)

    def free(self, copy: Copy) -> None:
        """Takes its pages, if it has any. Nobody may be using it."""
        assert copy.users == 0, f"copy {copy.id} loses its pages while it has users"
        if copy.on_device:
            self.rank_pages.release(copy.pages, copy.last_step)
            self.filling -= copy.device is Device.FILLING
            copy.pages, copy.device = {}, Device.NONE
            del self.on_device[copy.id]
            self.reclassify(copy)

    def reclassify(self, copy: Copy) -> None:
        """Something about it changed: is it idle, and does somebody wait for it?"""
        self.version += 1
        idle = self._is_idle(copy)
        place = self._waiting_order(copy) if idle else None
        if place is not None:
            self._wanted.put(copy.id, place)
        else:
            self._wanted.drop(copy.id)
        if idle and place is None:
            self._spare.put(copy.id, copy.last_used if self._policy == "lru" else copy.filled_since)
        else:
            self._spare.drop(copy.id)

    def step_done(self, step: int) -> None:
        """Steps up to `step` are done."""
        self.version += self.rank_pages.step_done(step)

    def bytes(self, copies: Iterable[Copy]) -> int:
        """What a fill of these copies."""
        sizes = self._capacity.rank_page_bytes
        return sum(sum(count * sizes.get(g, 0) for g, count in c.need.items()) or c.info.bytes for c in copies)

    # ------------------------------------------------------------------------------------------------ keys as users

    def limit_error(self, copies: Sequence[Copy]) -> str | None:
        """Why these can never be together in a lane, judging by what is known now."""
        for copy in copies:
            if copy.error is not None:
                return copy.error
        for group, count in _sum(copies).items():
            if count > self._capacity.rank_pages.get(group, 0):
                return (
                    f"the adapter needs {count} LoRA rank pages of group {group}, but there are "
                    f"{self._capacity.rank_pages.get(group, 0)}; raise --max-lora-rank or widen --lora-target-modules"
                )
            if count > self._capacity.max_lane_pages:
                return (
                    f"the adapter or mix is {count} rank pages long in group {group}, but a lane holds at most "
                    f"{self._capacity.max_lane_pages}; mix fewer adapters or raise --max-lora-rank"
                )
        return None

    def use(self, copies: Iterable[Copy]) -> None:
        """A lane becomes a user of its copies, all of which are resident."""
        for copy in copies:
            assert copy.device is Device.RESIDENT, f"copy {copy.id} is used without pages"
            copy.users += 1
            self.reclassify(copy)

    def leave(self, copies: Iterable[Copy]) -> None:
        """A lane is no longer a user."""
        for copy in copies:
            copy.users -= 1
            assert copy.users >= 0, f"copy {copy.id} is released once too often"
            copy.last_used = self._tick()
            self.reclassify(copy)

    def lacking(self, copies: Sequence[Copy]) -> dict[str, int]:
        """By group, the pages that must still be given up before these can all be on the device."""
        return self.rank_pages.lacking(_sum(copy for copy in copies if not copy.on_device), with_cooling=True)

    def room(self) -> dict[str, int]:
        """By group, the pages that are free, cool, or would be if all idle copies had gone."""
        room = self.rank_pages.available()
        for copy_id in [*self._spare, *self._wanted]:
            for group, pages in self.on_device[copy_id].pages.items():
                room[group] += len(pages)
        return room

    def lacking_in(self, copies: Iterable[Copy], room: Mapping[str, int]) -> dict[str, int]:
        """By group, the pages that `room` lacks for all of these to be on the device."""
        need = _sum(copy for copy in copies if copy.device is Device.NONE or self._is_idle(copy))
        return {group: count - room.get(group, 0) for group, count in need.items() if count > room.get(group, 0)}

    def make_room(self, copies: Sequence[Copy], order: Order) -> list[Copy]:
        """Evicts what `copies` need to have pages, for somebody at `order`, or nobody if that won't do.

        Pages that steps in flight name are not free at once: they cool, and the next call finds them.
        """
        lacking = self.lacking(copies)
        victims = self._victims(lacking, {copy.id for copy in copies}, order) if lacking else []
        for copy in victims:
            self.free(copy)
        return victims

    def grant(self, copies: Sequence[Copy], step: int, at_once: bool = False) -> list[Fill] | None:
        """Pages for those of `copies` that have none, all or nothing: what step `step` is to fill.

        `at_once`: in the step itself, so that it may name them already. None: they are not free, or not yet.
        """
        missing = [copy for copy in copies if not copy.on_device]
        if self.rank_pages.lacking(_sum(missing), with_cooling=at_once):
            return None
        return [self._start_fill(copy, step, at_once) for copy in missing]

    def never_fits(self, copies: Sequence[Copy], pinned: Iterable[Copy]) -> str | None:
        """Why these could not even have pages if everything unpinned made room."""
        wanted = {copy.id for copy in copies}
        for group, count in _sum([*copies, *(c for c in pinned if c.on_device and c.id not in wanted)]).items():
            if count > self._capacity.rank_pages.get(group, 0):
                return f"the adapter does not fit beside the pinned ones (LoRA rank pages of group {group}); unpin one"
        return None

    def lane_pages(self, copies: Iterable[tuple[Copy, float]]) -> dict[str, list[tuple[int, float]]]:
        """What a lane of these copies with their scales holds: (page, scale) by group, sorted by revision."""
        pages: dict[str, list[tuple[int, float]]] = {}
        for copy, scale in sorted(copies, key=lambda pair: (pair[0].info.revision, pair[0].id)):
            assert copy.device is Device.RESIDENT, f"copy {copy.id} is not resident"
            for group, numbers in copy.pages.items():
                pages.setdefault(group, []).extend((page, scale) for page in numbers)
        return pages

    def audit(self, copies: Iterable[Copy], users: Mapping[int, int]) -> None:
        """Proves that pages and users (given by copy) are all accounted for."""
        copies = list(copies)
        self.rank_pages.audit(copy.pages for copy in copies)
        for copy in copies:
            name = f"copy {copy.id} ({copy.device.name})"
            assert copy.users == users.get(copy.id, 0), f"{name} counts {copy.users} users"
            held = {group: len(numbers) for group, numbers in copy.pages.items()}
            expected = {group: count for group, count in copy.need.items() if count} if copy.on_device else {}
            assert held == expected, f"{name} holds {held} of {expected} rank pages"
            idle = self._is_idle(copy)
            spare, wanted = copy.id in self._spare, copy.id in self._wanted
            assert idle == (spare or wanted), f"{name} is idle, or listed so, but not both"
            assert not idle or self._wanted.stamp(copy.id) == self._waiting_order(copy), (
                f"{name} is listed at another place"
            )
        assert set(users) <= {copy.id for copy in copies}, "a key uses a copy that is gone"
        assert self.on_device == {copy.id: copy for copy in copies if copy.on_device}, "others are on the device"
        assert self.filling == sum(copy.device is Device.FILLING for copy in copies), f"{self.filling} are being filled"

    # ----------------------------------------------------------------------------------------------------- private

    def _victims(self, lacking: dict[str, int], keep: set[int], order: Order) -> list[Copy]:
        victims: list[Copy] = []
        for copy_id in chain(self._spare, self._wanted.above(order)):
            copy = self.on_device[copy_id]
            if copy.id in keep or not (copy.pages.keys() & lacking.keys()):
                continue
            victims.append(copy)
            left = {group: count - len(copy.pages.get(group, ())) for group, count in lacking.items()}
            lacking = {group: count for group, count in left.items() if count > 0}
            if not lacking:
                return victims
        return []

    @staticmethod
    def _is_idle(copy: Copy) -> bool:
        return copy.device is Device.RESIDENT and not copy.users and not copy.pinned

    def _start_fill(self, copy: Copy, step: int, at_once: bool) -> Fill:
        assert copy.can_fill, f"copy {copy.id} is filled while it is not on the host"
        copy.pages = self.rank_pages.grant(copy.need, early=at_once)
        copy.last_step, copy.preload_order = step, None
        copy.fills += 1
        self.on_device[copy.id] = copy
        if at_once:
            self._resident(copy)
        else:
            copy.device = Device.FILLING
            self.filling += 1
        return Fill(copy.runner_id, {group: list(numbers) for group, numbers in copy.pages.items()}, at_once)

    def _resident(self, copy: Copy) -> None:
        copy.device = Device.RESIDENT
        copy.last_used = copy.filled_since = self._tick()
        self.reclassify(copy)


def _sum(copies: Iterable[Copy]) -> dict[str, int]:
    total: dict[str, int] = {}
    for copy in copies:
        for group, count in copy.need.items():
            if count:
                total[group] = total.get(group, 0) + count
    return total
