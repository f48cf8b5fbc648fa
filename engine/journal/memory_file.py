"""A file in memory that has no path: it needs no disk, nothing can delete it, and it ends with its last descriptor.

The launcher creates it and holds a descriptor; the processes that it starts may inherit it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Self


class MemoryFile:
    """The file behind `descriptor`. Every call raises OSError if it fails."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    @classmethod
    @contextlib.contextmanager
    def created(cls, name: str) -> Iterator[Self]:
        """Yields a new empty file, which is closed afterwards. `name` is what /proc shows."""
        descriptor = os.memfd_create(name, os.MFD_CLOEXEC)
        try:
            yield cls(descriptor)
        finally:
            os.close(descriptor)

    def read(self) -> bytes:
        """Returns the whole content."""
        parts: list[bytes] = []
        size = 0
        while part := os.pread(self.descriptor, 1 << 20, size):
            parts.append(part)
            size += len(part)
        return b"".join(parts)

    def write(self, data: bytes, offset: int) -> None:
        """Writes all of `data` at `offset`. After an OSError a first part of it may have been written."""
        left = memoryview(data)
        while left:
            written = os.pwrite(self.descriptor, left, offset)
            left, offset = left[written:], offset + written

    def truncate(self, size: int) -> None:
        """Cuts the file to `size` bytes."""
        os.ftruncate(self.descriptor, size)
