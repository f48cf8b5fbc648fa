"""Memory that was freed goes back to the system."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest
from fixtures.processes.resources import private_bytes

from tokenizer_proc.work import freed_memory

PIECE, PIECES = 100_000, 1000
LARGE = """
import ctypes, sys
from pathlib import Path
from tokenizer_proc.work import freed_memory
if sys.argv[1] == "mapped":
    freed_memory.map_large_pieces()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free(ctypes.c_void_p(libc.malloc(16 << 20)))  # the C library takes this as the size of pieces to keep
pieces, pins = [], []
for _ in range(20):
    pieces.append(libc.malloc(4 << 20))
    pins.append(libc.malloc(100_000))  # not at the top of the heap
    ctypes.memset(pieces[-1], 1, 4 << 20)
for piece in pieces:
    libc.free(ctypes.c_void_p(piece))
print(next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if "RssAnon" in line))
"""


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


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="no glibc")
def test_large_pieces_go_back_when_they_are_freed() -> None:
    kept, mapped = (
        int(subprocess.run([sys.executable, "-c", LARGE, how], capture_output=True, check=True).stdout)
        for how in ("kept", "mapped")
    )
    assert kept - mapped > 40 << 10  # kB, of 80 MiB
