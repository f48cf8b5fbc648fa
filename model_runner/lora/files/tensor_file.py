"""One safetensors file: the header is read and checked first, then the tensors one at a time, each read once.

The header's size is bounded, and the header is checked against the file's size before any tensor is read. The tensors
are hashed as they are read, so the hash is that of the values that are used. The file is opened once, by its directory,
and header and tensors are read from the open file: replacing the file under its name later has no effect.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import msgspec
import torch

from engine.directory import read_exactly
from engine.errors import AdapterError

SLICE_BYTES = 4 << 20
"""Bytes that are read and hashed at a time; they fit the processor's cache."""

MAX_HEADER_BYTES = 16 << 20

FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


class Entry(msgspec.Struct, frozen=True):
    """One tensor in the header; offsets count from the end of the header."""

    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]

    @property
    def size(self) -> int:
        """The size of the tensor in bytes."""
        return self.data_offsets[1] - self.data_offsets[0]


@dataclass(frozen=True, eq=False)
class TensorFile:
    """A safetensors file whose header has been read; `tensors` reads the tensors while its directory is open."""

    name: str
    file: BinaryIO = field(repr=False)
    size: int
    head: bytes = field(repr=False)
    entries: dict[str, Entry] = field(repr=False)

    def tensors(self, digest: Callable[[bytes], None]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields every tensor with its name, in the file's order. All use one buffer: each overwrites the last.

        After the last one, `digest` is called with the sha256 of the whole file.
        """
        hashed = hashlib.sha256()
        ordered = sorted(self.entries.items(), key=lambda item: item[1].data_offsets)
        buffer = torch.empty(max((entry.size for _, entry in ordered), default=0), dtype=torch.uint8)
        room = buffer.numpy().data
        file = self.file
        file.seek(0)
        if os.fstat(file.fileno()).st_size != self.size or read_exactly(file, len(self.head)) != self.head:
            raise self._changed()
        hashed.update(self.head)
        for name, entry in ordered:
            for start in range(0, entry.size, SLICE_BYTES):
                part = room[start : min(start + SLICE_BYTES, entry.size)]
                if file.readinto(part) != len(part):  # type: ignore[attr-defined]
                    raise self._changed()
                hashed.update(part)
            yield name, buffer[: entry.size].view(FLOATS[entry.dtype]).view(entry.shape)
        digest(hashed.digest())

    @property
    def data_bytes(self) -> int:
        """The bytes of all tensors of the file."""
        return self.size - len(self.head)

    def _changed(self) -> AdapterError:
        return AdapterError(f"{self.name}: changed while it was being read")


def open_tensors(file: BinaryIO, name: str) -> TensorFile:
    """Reads and checks the header of `file`. Raises AdapterError for anything but a complete safetensors file."""
    size = os.fstat(file.fileno()).st_size
    prefix = read_exactly(file, 8)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > size - 8:
        raise AdapterError(f"{name}: truncated ({size} bytes, the header needs {8 + length})")
    if length > MAX_HEADER_BYTES:
        raise AdapterError(f"{name}: its header claims {length} bytes, at most {MAX_HEADER_BYTES} are read")
    raw = read_exactly(file, length)
    entries = _entries(name, raw)
    _check_extent(name, entries, size - 8 - length)
    return TensorFile(name, file, size, prefix + raw, entries)


def _entries(name: str, raw: bytes) -> dict[str, Entry]:
    try:
        fields: dict[str, Any] = msgspec.json.decode(raw, type=dict[str, Any])
        fields.pop("__metadata__", None)
        return msgspec.convert(fields, dict[str, Entry])
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise AdapterError(f"{name}: its header is no safetensors header ({error})") from error


def _check_extent(name: str, entries: dict[str, Entry], available: int) -> None:
    for tensor, entry in entries.items():
        begin, end = entry.data_offsets
        if min(begin, *entry.shape, 0) < 0 or end < begin:
            raise AdapterError(f"{name}: tensor {tensor!r} has a negative size")
        if end > available:
            raise AdapterError(f"{name}: truncated (tensor {tensor!r} ends at byte {end} of {available})")
        dtype = FLOATS.get(entry.dtype)
        if dtype is not None and math.prod(entry.shape) * dtype.itemsize != end - begin:
            raise AdapterError(
                f"{name}: tensor {tensor!r} claims {entry.dtype} {entry.shape} but occupies {end - begin} bytes"
            )
    used = 0
    for begin, end, tensor in sorted((*entry.data_offsets, tensor) for tensor, entry in entries.items()):
        if begin != used:
            raise AdapterError(f"{name}: tensor {tensor!r} begins at byte {begin}, where {used} is due")
        used = end
    if used != available:
        raise AdapterError(f"{name}: {available - used} bytes belong to no tensor")
