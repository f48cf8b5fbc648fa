"""The log-probabilities of many positions, packed until they are written, and read again in slices.

As objects they would take ten times the memory, and a million of them would slow down every pass of the garbage
collector, during which the event loop stands still.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import msgspec

from engine.messages import PositionLogprobs

Position = PositionLogprobs | None

SLICE_ENTRIES = 2048  # the tokens with log-probabilities that a slice has at least, if it is not the last one

_ENCODER = msgspec.msgpack.Encoder()
_DECODER: msgspec.msgpack.Decoder[list[Position]] = msgspec.msgpack.Decoder(list[Position])


def entries(positions: Sequence[Position]) -> int:
    """Returns the number of tokens with log-probabilities that `positions` have."""
    return sum(1 if one is None else 1 + len(one.top) + len(one.asked) for one in positions)


class PackedLogprobs:
    """Log-probabilities of successive positions. `check` is called before each slice is read, and may raise.

    A position is None if no token precedes it.
    """

    def __init__(self, check: Callable[[], None] = lambda: None) -> None:
        self.bytes = 0  # the size of what is packed
        self._check = check
        self._packed: list[tuple[int, bytes]] = []  # the number of positions of each slice, and the slice
        self._open: list[Position] = []
        self._open_entries = 0
        self._length = 0

    def add(self, positions: Sequence[Position]) -> None:
        """Appends `positions`."""
        self._open += positions
        self._length += len(positions)
        self._open_entries += entries(positions)
        if self._open_entries >= SLICE_ENTRIES:
            packed = _ENCODER.encode(self._open)
            self._packed.append((len(self._open), packed))
            self.bytes += len(packed)
            self._open, self._open_entries = [], 0

    def __len__(self) -> int:
        return self._length

    def slices(self, start: int = 0, stop: int | None = None) -> Iterator[list[Position]]:
        """Yields the positions from `start` up to `stop`, or to the end, in slices of bounded size."""
        begin, stop = 0, self._length if stop is None else stop
        for place in range(len(self._packed) + 1):
            is_packed = place < len(self._packed)
            end = begin + (self._packed[place][0] if is_packed else len(self._open))
            if begin < stop and end > start:
                self._check()
                found = _DECODER.decode(self._packed[place][1]) if is_packed else self._open
                yield found[max(0, start - begin) : stop - begin]
            begin = end
