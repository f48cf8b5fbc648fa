"""The rate of one API key: a limit a minute, charged before the work is done and settled afterwards.

    take      what a call asks for, at the door, if the other calls left something of the limit
    settle    when the call ends, what it did not use is given back

Two bounds hold, whatever the order of calls:

    in any minute     the limit and one call more: the last call that was let in while something was left
    in the long run   the limit: what that last call took beyond it is paid off before another one is let in

No call takes more than the limit by itself. So a refused call waits for a minute at most, and a large call is let in
under the same condition as a small one.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

Clock = Callable[[], float]

WINDOW = 60.0
"""The seconds over which a rate counts."""


class Charge:
    """What one call has taken from a rate: `amount` in all, `recent` of it within the last WINDOW seconds."""

    def __init__(self) -> None:
        self.amount = 0.0
        self.recent = 0.0
        self.entries: list[_Entry] = []


class _Entry:
    """An amount that a call took at one time (monotonic seconds)."""

    def __init__(self, charge: Charge, time: float, amount: float) -> None:
        self.charge = charge
        self.time = time
        self.amount = amount


class Rate:
    """A rate of `limit` units a minute; None: no limit. `clock` returns monotonic seconds."""

    def __init__(self, limit: float | None, clock: Clock = time.monotonic) -> None:
        self.limit = limit
        self._clock = clock
        self._entries: deque[_Entry] = deque()  # those of the last WINDOW seconds, the oldest first
        self._recent = 0.0  # the sum of their amounts
        self._level = limit or 0.0  # what the long run leaves: grows by the limit in a minute, up to the limit
        self._filled = clock()

    def fits(self, amount: float) -> bool:
        """Returns whether one call may take `amount` at all."""
        return self.limit is None or amount <= self.limit

    def wait(self, own: Charge | None = None) -> float:
        """Returns the seconds until a call may take something, from 0 (now) to WINDOW.

        `own` is the call's charge so far, which is not counted against the call itself.
        """
        if self.limit is None:
            return 0.0
        own = own or Charge()
        now = self._advance()
        level = self._level + own.amount
        for_level = 0.0 if level > 0 else -level / self.limit * WINDOW + 0.001
        return min(WINDOW, max(for_level, self._wait_for_window(now, own)))

    def take(self, amount: float, charge: Charge) -> None:
        """Adds `amount` to a call's charge, without checking `fits` and `wait`."""
        charge.amount += amount
        if self.limit is None or not amount:
            return
        entry = _Entry(charge, self._advance(), amount)
        charge.entries.append(entry)
        charge.recent += amount
        self._entries.append(entry)
        self._recent += amount
        self._level -= amount

    def settle(self, charge: Charge, used: float) -> None:
        """Ends a call's charge: gives back what was taken beyond `used`, the newest first."""
        back = max(0.0, charge.amount - used)
        charge.amount -= back
        if self.limit is None:
            return
        now = self._advance()
        self._level = min(self.limit, self._level + back)
        for entry in reversed(charge.entries):
            part = min(back, entry.amount)
            back -= part
            entry.amount -= part
            if entry.time > now - WINDOW:
                charge.recent -= part
                self._recent -= part
        charge.entries.clear()

    @property
    def left(self) -> float:
        """What is left of the limit at present, at least 0."""
        self._advance()
        return max(0.0, min((self.limit or 0.0) - self._recent, self._level))

    @property
    def reset(self) -> float:
        """The seconds until the window is empty, from 0 to WINDOW."""
        now = self._advance()
        return self._entries[-1].time + WINDOW - now if self._entries else 0.0

    def _wait_for_window(self, now: float, own: Charge) -> float:
        """Returns the seconds until the other calls' entries of the last WINDOW seconds are below the limit."""
        limit, others = self.limit or 0.0, self._recent - own.recent
        for entry in self._entries:
            if others < limit:
                return 0.0
            if entry.charge is not own:
                others -= entry.amount
                if others < limit:
                    return entry.time + WINDOW - now
        return 0.0

    def _advance(self) -> float:
        """Drops the entries that are older than WINDOW, raises the level, and returns the time."""
        now, limit = self._clock(), self.limit or 0.0
        while self._entries and self._entries[0].time <= now - WINDOW:
            entry = self._entries.popleft()
            entry.charge.recent -= entry.amount
            self._recent -= entry.amount
        if not self._entries:
            self._recent = 0.0  # without the rounding errors of the sums
        self._level = min(limit, self._level + (now - self._filled) * limit / WINDOW)
        self._filled = now
        return now
