"""Which copies hold rank pages. Knows nothing of requests, lanes, queues, or how a copy came to the host tier.

A user is a lane key that was promised the copy: it waits for the fill, for a lane, or runs. A copy without users is
idle: its pages go to others, in the order of the policy. Grants are all or nothing for all copies of a key.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from engine.messages import Capacity, Fill
from scheduler.adapter import Copy, Device
from scheduler.eviction import EvictionOrder, Policy
from scheduler.rank_pages import RankPages


class Residency:
    """Copies by id while they hold rank pages."""

    def __init__(self, capacity: Capacity, policy: Policy, tick: Callable[[], int]) -> None:
        self._policy = policy
        self._tick = tick
        self.reset(capacity)

    def reset(self, capacity: Capacity) -> None:
        """A new runner holds nothing."""
        self._capacity = capacity
        self.rank_pages = RankPages(capacity.rank_pages)
        self.on_device: dict[int, Copy] = {}
        self._idle = EvictionOrder()

    # ---------------------------------------------------------------------------------------------------- one copy

    def filled(self, copy: Copy) -> None:
        """The runner answered the fill: lanes may name its pages."""
        assert copy.device is Device.FILLING
        copy.device = Device.RESIDENT
        copy.last_used = copy.filled_since = self._tick()
        self.rest(copy)

    def free(self, copy: Copy) -> None:
        """Takes its pages, if it has any. Nobody may be using it."""
        assert copy.users == 0, f"copy {copy.id} loses its pages while it has users"
        if copy.on_device:
            self.rank_pages.release(copy.pages, copy.last_step)
            copy.pages, copy.device = {}, Device.NONE
            self._idle.drop(copy.id)
            del self.on_device[copy.id]

    def rest(self, copy: Copy) -> None:
        """Something about it changed: is it idle?"""
        if copy.device is Device.RESIDENT and not copy.users and not copy.pinned:
            self._idle.put(copy.id, copy.last_used if self._policy == "lru" else copy.filled_since)
        else:
            self._idle.drop(copy.id)

    # ------------------------------------------------------------------------------------------------ keys as users

    def problem(self, copies: Sequence[Copy]) -> str | None:
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

    def promise(self, copies: Iterable[Copy]) -> None:
        """A key becomes a user of its copies, which all hold their pages."""
        for copy in copies:
            assert copy.on_device, f"copy {copy.id} is promised without pages"
            copy.users += 1
            self.rest(copy)

    def release(self, copies: Iterable[Copy]) -> None:
        """A key is no longer a user."""
        for copy in copies:
            copy.users -= 1
            assert copy.users >= 0, f"copy {copy.id} is released once too often"
            copy.last_used = self._tick()
            self.rest(copy)

    def make_room(self, copies: Sequence[Copy]) -> list[Copy]:
        """Evicts what `copies` need to have pages: idle ones in the order of the policy, or nobody if that won't do.

        Pages that steps in flight name are not free at once: they cool, and the next call finds them.
        """
        need = _sum(copy for copy in copies if not copy.on_device)
        lacking = self.rank_pages.lacking(need, with_cooling=True)
        victims = self._victims(lacking, {copy.id for copy in copies}) if lacking else []
        for copy in victims:
            self.free(copy)
        return victims

    def grant(self, copies: Sequence[Copy], step: int) -> list[Fill] | None:
        """Pages for those of `copies` that have none, all or nothing: what step `step` is to fill."""
        missing = [copy for copy in copies if not copy.on_device]
        if self.rank_pages.lacking(_sum(missing)):
            return None
        return [self._start_fill(copy, step) for copy in missing]

    def hopeless(self, copies: Sequence[Copy], pinned: Iterable[Copy]) -> str | None:
        """Why these could not even have pages if everything unpinned made room."""
        wanted = {copy.id for copy in copies}
        for group, count in _sum([*copies, *(c for c in pinned if c.on_device and c.id not in wanted)]).items():
            if count > self._capacity.rank_pages.get(group, 0):
                return f"the adapter does not fit beside the pinned ones (LoRA rank pages of group {group}); unpin one"
        return None

    def lane_pages(self, copies: Iterable[tuple[Copy, float]]) -> dict[str, list[tuple[int, float]]]:
        """What a lane of these copies with their scales holds: (page, scale) by group, sorted by revision."""
        pages: dict[str, list[tuple[int, float]]] = {}
        for copy, scale in sorted(copies, key=lambda pair: (pair[0].card.revision, pair[0].id)):
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
            idle = copy.device is Device.RESIDENT and not copy.users and not copy.pinned
            assert idle == (copy.id in self._idle), f"{name} is idle, or listed so, but not both"
        assert set(users) <= {copy.id for copy in copies}, "a key uses a copy that is gone"
        assert self.on_device == {copy.id: copy for copy in copies if copy.on_device}, "others are on the device"

    # ----------------------------------------------------------------------------------------------------- private

    def _victims(self, lacking: dict[str, int], keep: set[int]) -> list[Copy]:
        victims: list[Copy] = []
        for copy_id in self._idle:
            copy = self.on_device[copy_id]
            if copy_id in keep or not (copy.pages.keys() & lacking.keys()):
                continue
            victims.append(copy)
            left = {group: count - len(copy.pages.get(group, ())) for group, count in lacking.items()}
            lacking = {group: count for group, count in left.items() if count > 0}
            if not lacking:
                return victims
        return []

    def _start_fill(self, copy: Copy, step: int) -> Fill:
        assert copy.can_fill, f"copy {copy.id} is filled while it is not on the host"
        copy.pages = self.rank_pages.grant(copy.need)
        copy.device, copy.last_step, copy.wish = Device.FILLING, step, None
        self.on_device[copy.id] = copy
        return Fill(copy.holder, {group: list(numbers) for group, numbers in copy.pages.items()})


def _sum(copies: Iterable[Copy]) -> dict[str, int]:
    total: dict[str, int] = {}
    for copy in copies:
        for group, count in copy.need.items():
            if count:
                total[group] = total.get(group, 0) + count
    return total
