"""Memory that was freed goes back to the system."""

from __future__ import annotations

import ctypes

import pytest
from fixtures.processes.resources import private_bytes

from tokenizer_proc.work import freed_memory

PIECE, PIECES = 100_000, 1000


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="no glibc")
def test_freed_memory_is_given_back() -> None:
    """Every second of many pieces is freed: the holes stay with the process until they are given back."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    pieces = [libc.malloc(PIECE) for _ in range(PIECES)]
    for piece in pieces:
        ctypes.memset(piece, 1, PIECE)
    for piece in pieces[::2]:
        libc.free(ctypes.c_void_p(piece))
    held = private_bytes()
    freed_memory.give_back()
    given = held - private_bytes()
    for piece in pieces[1::2]:
        libc.free(ctypes.c_void_p(piece))
    assert given > PIECE * PIECES / 4
