"""The memory of all requests together: bodies while they arrive, what they are decoded to, answers until they are read.

Every request has an account, which asks before its memory grows. An owner (a tenant, or a network as long as no key
names one) may hold at most twice as much as would then be left: two thirds of the budget while it is alone, two
fifths while two want all they can get. So there is always room for an owner that holds nothing.
"""

from __future__ import annotations

from engine.errors import InvalidRequest, Overloaded

LEFT_FACTOR = 2  # an owner may hold this many times what is left


class BodyTooLarge(InvalidRequest):
    """A body that would not be accepted at any other time either."""

    status = 413

    def __init__(self, message: str) -> None:
        super().__init__(message, code="request_too_large")


class MemoryBudget:
    """Counts bytes by owner. `total` is --max-request-memory."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.most = total * LEFT_FACTOR // (LEFT_FACTOR + 1)
        """The bytes that one owner can hold at most, which it can while no other holds any."""
        self.used = 0
        self._by_owner: dict[str, int] = {}

    def held_by(self, owner: str) -> int:
        """Returns the bytes that the accounts of `owner` hold."""
        return self._by_owner.get(owner, 0)

    def take(self, owner: str, count: int) -> None:
        """Adds `count` bytes. Raises Overloaded, and adds nothing, if `owner` may not hold so much now."""
        held = self._by_owner.get(owner, 0)
        if held + count > LEFT_FACTOR * (self.total - self.used - count):
            raise Overloaded(
                f"the memory for requests is used up: {self.used >> 20} of {self.total >> 20} MiB are held, "
                f"{held >> 20} of them by this caller (--max-request-memory)"
            )
        self.used += count
        if held + count:
            self._by_owner[owner] = held + count

    def give(self, owner: str, count: int) -> None:
        """Takes back `count` bytes that `owner` holds."""
        self.used -= count
        held = self._by_owner.pop(owner) - count
        if held:
            self._by_owner[owner] = held


class MemoryAccount:
    """The bytes of one request, by parts that change in size. `close` frees all."""

    def __init__(self, budget: MemoryBudget, owner: str) -> None:
        self._budget = budget
        self._most = budget.most
        self._owner = owner
        self._parts: dict[str, int] = {}
        self.held = 0

    def add(self, part: str, count: int) -> None:
        """Adds `count` bytes to a part. Raises BodyTooLarge or Overloaded, and adds nothing, if there is no room."""
        if self.held + count > self._most:
            raise BodyTooLarge(
                f"the request needs more than the {self._most >> 20} MiB of memory that one caller may hold "
                "(two thirds of --max-request-memory)"
            )
        self._budget.take(self._owner, count)
        self._parts[part] = self._parts.get(part, 0) + count
        self.held += count

    def set(self, part: str, count: int) -> None:
        """Sets the size of a part. Raises as `add` does, and then changes nothing."""
        more = count - self._parts.get(part, 0)
        if more == 0:
            return
        if more > 0:
            self.add(part, more)
        else:
            self._budget.give(self._owner, -more)
            self._parts[part] = count
            self.held += more

    def move(self, owner: str) -> None:
        """Counts for another owner from now on. To be called while nothing is held."""
        assert not self.held, "the bytes would have to be asked for again"
        self._owner = owner

    def close(self) -> None:
        """Frees all bytes."""
        if self.held:
            self._budget.give(self._owner, self.held)
            self._parts.clear()
            self.held = 0
