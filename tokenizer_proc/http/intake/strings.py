"""Finds the structural characters of JSON outside strings, in a body that arrives in pieces.

bytes that matter --> without backslashes and escaped quotes --> without what is inside strings
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.errors import InvalidRequest

MAX_STRING = 8 << 20  # bytes of one string as it is written; it is decoded at once
MAX_GAP = 64 << 10  # bytes of a number, or of white space

QUOTE, ESCAPE, OPEN, CLOSE, COMMA, COLON, EXPONENT = range(1, 8)
_KINDS = np.zeros(256, np.uint8)
for _characters, _kind in (
    (b'"', QUOTE),
    (b"\\", ESCAPE),
    (b"[{", OPEN),
    (b"]}", CLOSE),
    (b",", COMMA),
    (b":", COLON),
    (b"eE", EXPONENT),
):
    _KINDS[[*_characters]] = _kind


class Outside(NamedTuple):
    """Characters outside strings: their places in the piece, and their kinds (OPEN to EXPONENT)."""

    places: NDArray[np.int64]
    kinds: NDArray[np.uint8]


class StringScan:
    """The state of the scan between two pieces. `feed` raises InvalidRequest for too long a string or number."""

    def __init__(self) -> None:
        self._is_escaped = False  # whether the next byte is
        self._is_inside = False
        self._length = 0  # bytes since the last quote or structural character
        self.widest = 1  # bytes a character of the decoded strings, at most

    def feed(self, codes: NDArray[np.uint8]) -> Outside:
        """Returns the structural characters of the next piece, given as bytes, and the letter e of exponents."""
        if codes.size and codes.max() > 0x7F:
            self.widest = 4
        kinds = _KINDS[codes]
        places = np.flatnonzero(kinds)
        kinds = kinds[places]
        stays = self._unescaped(places, kinds, codes.size)
        places, kinds = places[stays], kinds[stays]
        is_quote = kinds == QUOTE
        is_inside = (np.cumsum(is_quote) + self._is_inside) % 2 == 1  # whether the bytes after each are in a string
        stays = is_quote | ~is_inside
        places, kinds, is_inside = places[stays], kinds[stays], is_inside[stays]
        is_edge = kinds != EXPONENT
        self._check_lengths(places[is_edge], is_inside[is_edge], codes.size)
        is_mark = kinds != QUOTE
        return Outside(places[is_mark], kinds[is_mark])

    def _unescaped(self, places: NDArray[np.int64], kinds: NDArray[np.uint8], size: int) -> NDArray[np.bool_]:
        """Returns which of the characters stay: no backslashes, and none that is escaped.

        Of adjacent backslashes every other one escapes the byte after it.
        """
        slashes = places[kinds == ESCAPE]
        if slashes.size:
            self.widest = 4
        if not slashes.size and not self._is_escaped:
            return np.ones(places.size, bool)
        is_first = np.ones(slashes.size, bool)
        is_first[1:] = np.diff(slashes) > 1
        number = np.arange(slashes.size)
        in_run = number - np.maximum.accumulate(np.where(is_first, number, 0))
        if self._is_escaped and slashes.size and slashes[0] == 0:  # the run began in the former piece
            in_run += np.cumsum(is_first) == 1
        is_escaped = np.zeros(size + 1, bool)
        is_escaped[0] = self._is_escaped
        is_escaped[slashes[in_run % 2 == 0] + 1] = True
        self._is_escaped = bool(is_escaped[size])
        stays: NDArray[np.bool_] = (kinds != ESCAPE) & ~is_escaped[places]
        return stays

    def _check_lengths(self, places: NDArray[np.int64], is_inside: NDArray[np.bool_], size: int) -> None:
        """Checks the distances between characters, which are lengths of strings or of what is between them."""
        lengths = np.diff(places, prepend=-self._length, append=size)
        inside = np.concatenate(([self._is_inside], is_inside))
        self._length, self._is_inside = int(lengths[-1]), bool(inside[-1])
        if lengths[inside].max(initial=0) > MAX_STRING:
            raise InvalidRequest(f"a string of the body has more than {MAX_STRING} bytes", code="too_long_string")
        if lengths[~inside].max(initial=0) > MAX_GAP:
            raise InvalidRequest(f"the body has a number, or white space, of more than {MAX_GAP} bytes")
