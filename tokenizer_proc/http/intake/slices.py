"""Decodes a large JSON body in slices, so that nothing holds the interpreter for long.

A list or an object of more than SLICE bytes is cut at the commas between its elements, and those that are larger than
SLICE by themselves in the same way. Each group of elements is decoded by msgspec, which also checks its syntax.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from tokenizer_proc.http.intake.shape import Marks
from tokenizer_proc.http.intake.strings import CLOSE, COLON, OPEN

SLICE = 64 << 10  # bytes; only one string or number may be longer

T = TypeVar("T")
Slices = Generator[int, None, T]  # yields the size in bytes of each slice that was decoded, and returns a value


def decode(body: bytearray, marks: Marks) -> Slices[object]:
    """Decodes the body, one slice with each step of the generator.

    Raises msgspec.DecodeError, UnicodeDecodeError or RecursionError as msgspec.json.decode does.
    """
    return (yield from _value(body, marks, 0, len(body)))


def _value(body: bytearray, marks: Marks, start: int, end: int) -> Slices[object]:
    """Decodes the value at body[start:end], whose marks are `marks`."""
    if end - start <= SLICE or not marks.places.size:
        value = msgspec.json.decode(body[start:end])
        yield end - start
        return value
    first, last = int(marks.places[0]), int(marks.places[-1])
    around = body[start:first] + body[last + 1 : end]
    own = marks.depths == marks.depths[0]
    closes = np.flatnonzero(own & (marks.kinds == CLOSE))
    if around.strip(b" \t\r\n") or marks.kinds[0] != OPEN or closes.tolist() != [marks.places.size - 1]:
        raise msgspec.DecodeError(f"JSON is malformed: no single value (byte {start})")
    match body[first : first + 1] + body[last : last + 1]:
        case b"[]":
            return (yield from _list(body, marks, np.flatnonzero(own)))
        case b"{}":
            return (yield from _object(body, marks, np.flatnonzero(own)))
    raise msgspec.DecodeError(f"JSON is malformed: brackets do not match (byte {last})")


def _list(body: bytearray, marks: Marks, own: NDArray[np.int64]) -> Slices[list[Any]]:
    values: list[Any] = []
    for low, high, inner in _groups(body, marks, own):
        if inner is None:
            values += msgspec.json.decode(b"[" + body[low:high] + b"]", type=list[Any])
            yield high - low
        else:
            values.append((yield from _value(body, inner, low, high)))
    return values


def _object(body: bytearray, marks: Marks, own: NDArray[np.int64]) -> Slices[dict[str, Any]]:
    members: dict[str, Any] = {}
    for low, high, inner in _groups(body, marks, own):
        if inner is None:
            members |= msgspec.json.decode(b"{" + body[low:high] + b"}", type=dict[str, Any])
            yield high - low
        elif not inner.places.size or inner.kinds[0] != COLON:
            raise msgspec.DecodeError(f"JSON is malformed: expected ':' (byte {low})")
        else:
            colon = int(inner.places[0])
            name = msgspec.json.decode(body[low:colon], type=str)
            members[name] = yield from _value(body, inner.between(1, inner.places.size), colon + 1, high)
    return members


def _groups(
    body: bytearray, marks: Marks, own: NDArray[np.int64]
) -> Generator[tuple[int, int, Marks | None], None, None]:
    """Yields ranges of the body with whole elements of a container. `own` are the indices of the container's marks.

    A range of several elements has at most SLICE bytes, and None; one that is longer is a single element, and has the
    element's marks.
    """
    cuts = own[marks.kinds[own] != COLON]
    places = marks.places[cuts]
    at = 0
    while at < len(places) - 1:
        low = int(places[at]) + 1
        to = max(at + 1, int(np.searchsorted(places, low + SLICE, "right")) - 1)
        high = int(places[to])
        if not body[low:high].strip(b" \t\r\n"):
            raise msgspec.DecodeError(f"JSON is malformed: expected a value (byte {low})")
        yield low, high, marks.between(int(cuts[at]) + 1, int(cuts[to])) if high - low > SLICE else None
        at = to
