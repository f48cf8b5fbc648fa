"""Gives memory that was freed back to the system: the C library else keeps the most that was ever in use."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import cast

_trim = cast("Callable[[int], int] | None", getattr(ctypes.CDLL(None), "malloc_trim", None))  # glibc has it


_options = cast("Callable[[int, int], int] | None", getattr(ctypes.CDLL(None), "mallopt", None))
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGE_BYTES = 256 << 10


def map_large_pieces() -> None:
    """Maps each piece of LARGE_BYTES or more by itself from now on, so that it goes back to the system when freed.

    Without this the C library raises that size to the largest piece that was ever freed.
    """
    if _options is not None:
        _options(M_MMAP_THRESHOLD, LARGE_BYTES)
        _options(M_TRIM_THRESHOLD, LARGE_BYTES)


def give_back() -> None:
    """Gives freed memory back. Takes some milliseconds, without the interpreter's lock."""
    if _trim is not None:
        _trim(0)
