"""The device cache: which copies hold rank pages. Knows no requests, queues or host cache.

    on_device     FILLING | RESIDENT in a lane | pinned | idle, which device_eviction may evict

A grant gives rank pages to all copies of a lane key, or to none of them.

Only this module writes `AdapterCopy.device`. A method that changes copies returns them, and its caller calls
`reclassify` for each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from engine.messages import Capacity, Fill
from scheduler.adapters.copies import AdapterCopy, DeviceCopy, DeviceState
from scheduler.adapters.device_eviction import DeviceEviction, WantedOrder, is_idle
from scheduler.adapters.device_limits import pages_needed
from scheduler.adapters.rank_pages import RankPages
from scheduler.adapters.stamp_order import Policy
from scheduler.types import Order


class DeviceCache:
    """The copies that hold rank pages, by id, and the free rank pages."""

    def __init__(self, capacity: Capacity, policy: Policy, tick: Callable[[], int], wanted_order: WantedOrder) -> None:
        self._policy = policy
        self._tick = tick
        self._wanted_order = wanted_order
        self.reset(capacity, ())

    def reset(self, capacity: Capacity, copies: Iterable[AdapterCopy]) -> None:
        """Empties the cache for a new runner with `capacity`. `copies`: all copies that exist."""
        self._capacity = capacity
        self.rank_pages = RankPages(capacity.rank_pages)
        self.on_device: dict[int, AdapterCopy] = {}  # in state FILLING or RESIDENT
        self.filling = 0  # how many copies are in state FILLING
        self.version = 0  # increases with each change after which a grant that failed before might succeed
        self.eviction = DeviceEviction(self._policy, self._wanted_order)
        for copy in copies:
            device = copy.device
            copy.device = DeviceCopy(filled_since=device.filled_since, last_used=device.last_used)

    @property
    def device(self) -> str:
        """The type of the runner's device: cpu or cuda."""
        return self._capacity.device

    # ---------------------------------------------------------------------------------------------------- one copy

    def answer_fill(self, copy: AdapterCopy) -> bool:
        """Counts the copy's oldest fill in flight as done. Returns whether this made the copy resident.

        A fill at once makes its copy resident already when it is planned. A background fill does so when it is done; it
        is always the last of the copy's fills in flight.
        """
        device = copy.device
        device.fills_in_flight -= 1
        if device.fills_in_flight or device.state is not DeviceState.FILLING:
            return False
        self.filling -= 1
        self._set_resident(copy)
        return True

    def drop_fills(self, copy: AdapterCopy) -> list[AdapterCopy]:
        """Sets the copy's fills in flight to 0: one failed, so the runner reports no more of them. Returns the copy."""
        copy.device.fills_in_flight = 0
        return [copy]

    def free(self, copies: Iterable[AdapterCopy]) -> list[AdapterCopy]:
        """Releases the pages of these copies, which must be in no lane. Returns the copies that had pages."""
        freed = [copy for copy in copies if copy.on_device]
        for copy in freed:
            device = copy.device
            assert device.lanes == 0, f"copy {copy.id} loses its pages while a lane contains it"
            self.rank_pages.release(device.pages, device.last_step)
            self.filling -= device.state is DeviceState.FILLING
            device.pages, device.state = {}, DeviceState.NONE
            del self.on_device[copy.id]
        return freed

    def reclassify(self, copy: AdapterCopy) -> None:
        """Updates whether the copy is listed as spare, as wanted or as neither, after it has changed."""
        self.version += 1
        self.eviction.reclassify(copy)

    def mark_used(self, copies: Iterable[AdapterCopy], step: int) -> None:
        """Records that step `step` names the pages of these copies."""
        for copy in copies:
            copy.device.last_step = step

    def step_done(self, step: int) -> None:
        """Frees the pages that only steps up to `step` name: these steps are done."""
        self.version += self.rank_pages.step_done(step)

    def fill_bytes(self, copies: Iterable[AdapterCopy]) -> int:
        """Returns how many bytes the fills of these copies transfer."""
        sizes = self._capacity.rank_page_bytes
        return sum(
            sum(count * sizes.get(group, 0) for group, count in copy.pages_needed.items()) or copy.info.bytes
            for copy in copies
        )

    # ------------------------------------------------------------------------------------------------------- lanes

    def acquire(self, copies: Sequence[AdapterCopy]) -> Sequence[AdapterCopy]:
        """Records that a new lane contains these copies, all of which must be resident. Returns the copies."""
        for copy in copies:
            assert copy.device.state is DeviceState.RESIDENT, f"copy {copy.id} is in a lane without pages"
            copy.device.lanes += 1
        return copies

    def release(self, copies: Sequence[AdapterCopy]) -> Sequence[AdapterCopy]:
        """Records that a lane which contained these copies has become free. Returns the copies."""
        for copy in copies:
            copy.device.lanes -= 1
            assert copy.device.lanes >= 0, f"copy {copy.id} is released once too often"
            copy.device.last_used = self._tick()
        return copies

    def lacking(self, copies: Sequence[AdapterCopy]) -> dict[str, int]:
        """Returns by group how many pages other copies must release before all of `copies` can be on the device."""
        return self.rank_pages.lacking(pages_needed(copy for copy in copies if not copy.on_device), with_cooling=True)

    def room(self) -> dict[str, int]:
        """Returns by group how many pages are free, cooling or held by idle copies."""
        room = self.rank_pages.available()
        for copy_id in self.eviction.candidates():
            for group, pages in self.on_device[copy_id].device.pages.items():
                room[group] += len(pages)
        return room

    def lacking_in(self, copies: Iterable[AdapterCopy], room: Mapping[str, int]) -> dict[str, int]:
        """Returns by group how many pages `room`, a result of `room()`, lacks to hold all of these copies."""
        need = pages_needed(copy for copy in copies if not copy.on_device or is_idle(copy))
        return {group: count - room.get(group, 0) for group, count in need.items() if count > room.get(group, 0)}

    def evict_for(self, copies: Sequence[AdapterCopy], order: Order) -> list[AdapterCopy]:
        """Evicts other copies until there are pages for `copies`, needed at `order`. Returns the evicted copies.

        Evicts none if all that may be evicted are not enough. Pages that steps in flight name are cooling first: a
        background fill can have them only once these steps are done.
        """
        lacking = self.lacking(copies)
        if not lacking:
            return []
        return self.free(self.eviction.choose_victims(lacking, {copy.id for copy in copies}, order, self.on_device))

    def grant(self, copies: Sequence[AdapterCopy], step: int, at_once: bool = False) -> list[Fill] | None:
        """Grants pages to each of `copies` that has none, and returns their fills, which are sent with step `step`.

        Returns None and grants nothing if there are not enough pages for all of them. `at_once`: the fills run before
        the forward of the step, which may use the pages; only such fills may take pages that steps in flight name.
        """
        missing = [copy for copy in copies if not copy.on_device]
        if self.rank_pages.lacking(pages_needed(missing), with_cooling=at_once):
            return None
        return [self._start_fill(copy, step, at_once) for copy in missing]

    def lane_pages(self, copies: Iterable[tuple[AdapterCopy, float]]) -> dict[str, list[tuple[int, float]]]:
        """Returns by group the (page, scale) pairs of a lane that consists of these copies, sorted by revision."""
        pages: dict[str, list[tuple[int, float]]] = {}
        for copy, scale in sorted(copies, key=lambda pair: (pair[0].info.revision, pair[0].id)):
            assert copy.device.state is DeviceState.RESIDENT, f"copy {copy.id} is not resident"
            for group, numbers in copy.device.pages.items():
                pages.setdefault(group, []).extend((page, scale) for page in numbers)
        return pages

    def audit(self, copies: Iterable[AdapterCopy], lanes: Mapping[int, int]) -> None:
        """Asserts that all pages are accounted for, and that the copies are in as many lanes as `lanes` says by id."""
        copies = list(copies)
        self.rank_pages.audit(copy.device.pages for copy in copies)
        for copy in copies:
            self._audit_copy(copy, lanes.get(copy.id, 0))
        assert set(lanes) <= {copy.id for copy in copies}, "a lane contains a copy that does not exist"
        assert self.on_device == {copy.id: copy for copy in copies if copy.on_device}, "other copies are on the device"
        filling = sum(copy.device.state is DeviceState.FILLING for copy in copies)
        assert self.filling == filling, f"{self.filling} copies are being filled"

    # ----------------------------------------------------------------------------------------------------- private

    def _audit_copy(self, copy: AdapterCopy, lanes: int) -> None:
        name = f"copy {copy.id} ({copy.device.state.name})"
        assert copy.device.lanes == lanes, f"{name} counts {copy.device.lanes} lanes"
        held = {group: len(numbers) for group, numbers in copy.device.pages.items()}
        expected = {group: count for group, count in copy.pages_needed.items() if count} if copy.on_device else {}
        assert held == expected, f"{name} holds {held} of {expected} rank pages"
        self.eviction.audit(copy, name)

    def _start_fill(self, copy: AdapterCopy, step: int, at_once: bool) -> Fill:
        assert copy.can_fill, f"copy {copy.id} is filled while it is not on the host"
        device = copy.device
        device.pages = self.rank_pages.grant(copy.pages_needed, early=at_once)
        device.last_step = step
        device.fills_in_flight += 1
        self.on_device[copy.id] = copy
        if at_once:
            self._set_resident(copy)
        else:
            device.state = DeviceState.FILLING
            self.filling += 1
        return Fill(copy.runner_id, {group: list(numbers) for group, numbers in device.pages.items()}, at_once)

    def _set_resident(self, copy: AdapterCopy) -> None:
        copy.device.state = DeviceState.RESIDENT
        copy.device.last_used = copy.device.filled_since = self._tick()
