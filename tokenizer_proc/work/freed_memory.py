"""Gives memory that was freed back to the system: the C library else keeps the most that was ever in use."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import cast

_trim = cast("Callable[[int], int] | None", getattr(ctypes.CDLL(None), "malloc_trim", None))  # glibc has it


def give_back() -> None:
    """Gives freed memory back. Takes some milliseconds, without the interpreter's lock."""
    if _trim is not None:
        _trim(0)
