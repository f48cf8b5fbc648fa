"""The shape of a JSON body: the numbers of its values, containers and members, counted before objects are made of it.

The scan finds the marks of the body, which are the structural characters outside strings, in the pieces that have
arrived, and counts them. It is no parser: what it accepts may be no JSON, which the decoder then refuses.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from engine.errors import InvalidRequest
from tokenizer_proc.http.intake.strings import CLOSE, COLON, COMMA, EXPONENT, OPEN, Outside, StringScan

STEP = 64 << 10  # bytes that are scanned at once
MAX_VALUES = 1_200_000  # values in the whole body, or in a field of WIDE
MAX_FIELD_VALUES = 1 << 16  # values in any other field
MAX_CONTAINERS = 1 << 16  # lists and objects
MAX_MEMBERS = 1 << 16  # members of objects
MAX_DEPTH = 64
MAX_EXPONENTS = 1000  # numbers like 1e300, each of which takes 10 microseconds to decode
WIDE = frozenset({"input_ids", "prompt", "tokens"})  # the fields that hold token ids

_KEY = re.compile(rb'\s*("(?:[^"\\]|\\.)*")')
_LONGEST_KEY = 512  # bytes in which the name of a field is looked for
_DIGITS = np.frombuffer(b"+0123456789", np.uint8)


class Marks(NamedTuple):
    """The structural characters outside strings: places in the body, kinds, and depths of their containers from 1."""

    places: NDArray[np.int64]
    kinds: NDArray[np.uint8]
    depths: NDArray[np.int16]

    def between(self, low: int, high: int) -> Marks:
        """Returns those with the indices low to high - 1."""
        return Marks(self.places[low:high], self.kinds[low:high], self.depths[low:high])


class ShapeScan:
    """Scans a body while it arrives. `feed` raises InvalidRequest as soon as the body exceeds a bound."""

    def __init__(self) -> None:
        self.scanned = 0  # bytes
        self.values = self.containers = self.members = 0
        self._strings = StringScan()
        self._marks: list[Marks] = []
        self._depth = self._exponents = 0
        self._field_began = 1  # the place after the bracket or comma before the current field
        self._field_values = 0

    @property
    def marks(self) -> Marks:
        """The marks of all pieces."""
        return Marks(*(np.concatenate(parts) for parts in zip(*self._marks, strict=True)))

    @property
    def decoded_bytes(self) -> int:
        """A bound on the memory of the objects that the body is decoded to."""
        return self.scanned * self._strings.widest + 64 * (self.values + self.members) + 192 * self.containers

    def feed(self, body: bytearray | bytes) -> None:
        """Scans the bytes of `body` that are new since the last call, in steps of STEP bytes."""
        while self.scanned < len(body):
            codes = np.frombuffer(body, np.uint8, min(STEP, len(body) - self.scanned), self.scanned)
            self._step(body, codes, self._strings.feed(codes))
            self.scanned += codes.size

    def _step(self, body: bytearray | bytes, codes: NDArray[np.uint8], found: Outside) -> None:
        is_exponent = found.kinds == EXPONENT
        if is_exponent.any():
            self._count_exponents(body, codes, found.places[is_exponent])
            found = Outside(found.places[~is_exponent], found.kinds[~is_exponent])
        marks = Marks(found.places + self.scanned, found.kinds, self._depths(found.kinds))
        self._count(body, marks)
        self._count_field(body, marks)
        self._marks.append(marks)

    def _depths(self, kinds: NDArray[np.uint8]) -> NDArray[np.int16]:
        """Returns the depth of each mark's container; a bracket belongs to the container that it opens or closes."""
        closes = (kinds == CLOSE).astype(np.int64)
        inside = self._depth + np.cumsum((kinds == OPEN) - closes)
        depths = inside + closes
        if not kinds.size:
            return np.empty(0, np.int16)
        self._depth = int(inside[-1])
        if depths.max() > MAX_DEPTH:
            raise InvalidRequest(f"the body is nested too deeply: at most {MAX_DEPTH} lists and objects")
        if inside.min() < 0:
            raise InvalidRequest("the body is not valid JSON: it closes a list or an object that it did not open")
        return np.asarray(depths, np.int16)

    def _count(self, body: bytearray | bytes, marks: Marks) -> None:
        kinds = np.bincount(marks.kinds, minlength=EXPONENT + 1)
        self.values += int(kinds[COMMA] + kinds[OPEN])
        self.containers += int(kinds[OPEN])
        self.members += int(kinds[COLON])
        for number, bound, what in (
            (self.values, MAX_VALUES, "values"),
            (self.containers, MAX_CONTAINERS, "lists and objects"),
            (self.members, MAX_MEMBERS, "members of objects"),
        ):
            if number > bound:
                last = marks.places[marks.depths == 1]
                began = int(last[-1]) + 1 if last.size and last[-1] > self._field_began else self._field_began
                raise _too_many(f"the body holds more than {bound} {what}", _name(body, began))

    def _count_field(self, body: bytearray | bytes, marks: Marks) -> None:
        """Counts the values of the current field. A field that lies within one step cannot exceed the bound."""
        counts = np.cumsum((marks.depths > 1) & (marks.kinds != CLOSE))
        ends = np.flatnonzero((marks.depths == 1) & (marks.kinds == COMMA))
        if ends.size:
            self._check_field(body, self._field_values + int(counts[ends[0]]))
            self._field_began = int(marks.places[ends[-1]]) + 1
            self._field_values = int(counts[-1] - counts[ends[-1]])
        elif counts.size:
            self._field_values += int(counts[-1])
        self._check_field(body, self._field_values)

    def _check_field(self, body: bytearray | bytes, values: int) -> None:
        if values > MAX_FIELD_VALUES and (name := _name(body, self._field_began)) not in WIDE:
            raise _too_many(f"it holds more than {MAX_FIELD_VALUES} values", name)

    def _count_exponents(self, body: bytearray | bytes, codes: NDArray[np.uint8], places: NDArray[np.int64]) -> None:
        """Counts the numbers with a positive exponent. Those at the end of a step count in any case."""
        after = np.append(codes, _DIGITS[0])[places + 1]
        self._exponents += int(np.isin(after, _DIGITS).sum())
        if self._exponents > MAX_EXPONENTS:
            what = f"the body holds more than {MAX_EXPONENTS} numbers with a positive exponent"
            raise _too_many(what, _name(body, self._field_began))


def _name(body: bytearray | bytes, place: int) -> str | None:
    """Returns the name of the field that begins at `place`, or None if that is no string."""
    match = _KEY.match(body[place : place + _LONGEST_KEY])
    try:
        return None if match is None else msgspec.json.decode(match[1], type=str)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def _too_many(message: str, field: str | None) -> InvalidRequest:
    return InvalidRequest(f"{field}: {message}" if field else message, param=field, code="too_many_values")
