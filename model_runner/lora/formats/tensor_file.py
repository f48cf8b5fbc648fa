"""One safetensors file: its header first, checked against the file's size, its bytes later and only once.

The header is bounded and checked before any tensor is read, so that a lying file costs nothing. The bytes that are
hashed are the bytes that are used. Knows nothing of adapters.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse

from engine.errors import AdapterError

MAX_HEADER_BYTES = 16 << 20

FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


class Entry(msgspec.Struct, frozen=True):
    """What the header says of one tensor; offsets count from the end of the header."""

    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


@dataclass(frozen=True, eq=False)
class TensorFile:
    """The header of a safetensors file; `read` brings the tensors."""

    path: Path
    size: int
    head: bytes = field(repr=False)
    entries: dict[str, Entry] = field(repr=False)

    def read(self, digest: Callable[[bytes], None]) -> dict[str, torch.Tensor]:
        """All tensors. `digest` gets the sha256 of exactly the bytes they came from."""
        with self.path.open("rb") as file:
            data = file.read(self.size + 1)
        if len(data) != self.size or not data.startswith(self.head):
            raise AdapterError(f"{self.path.name}: changed while it was being read")
        digest(hashlib.sha256(data).digest())
        try:
            tensors: dict[str, torch.Tensor] = parse(data)
        except SafetensorError as error:
            raise AdapterError(f"{self.path.name}: {error}") from error
        if {name: list(tensor.shape) for name, tensor in tensors.items()} != self._shapes:
            raise AdapterError(f"{self.path.name}: its header can be read in two ways")
        return tensors

    @property
    def _shapes(self) -> dict[str, list[int]]:
        return {name: entry.shape for name, entry in self.entries.items()}


def open_tensors(path: Path) -> TensorFile:
    """The file's header, checked. Raises AdapterError for anything that is not a whole safetensors file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > size - 8:
            raise AdapterError(f"{path.name}: truncated ({size} bytes, the header needs {8 + length})")
        if length > MAX_HEADER_BYTES:
            raise AdapterError(f"{path.name}: its header claims {length} bytes, at most {MAX_HEADER_BYTES} are read")
        raw = file.read(length)
    entries = _entries(path.name, raw)
    _check_extent(path.name, entries, size - 8 - length)
    return TensorFile(path, size, prefix + raw, entries)


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
    used = max((entry.data_offsets[1] for entry in entries.values()), default=0)
    if used != available:
        raise AdapterError(f"{name}: {available - used} bytes belong to no tensor")
