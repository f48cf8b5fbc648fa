"""An adapter in the normal form as one piece of shared memory, to be handed from one process to another.

    | A | B | A | B | ...            | label       each half at a multiple of 64 bytes; the label says where
    |<--------- `tensors` bytes ---->|

The memory has no name: it is given back when the last mapping and descriptor of it are gone. Whoever receives one
trusts nothing: every number is checked before a view is made. Knows nothing of processes.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable
from dataclasses import dataclass

import msgspec
import torch

from engine.errors import AdapterError
from engine.ipc import UNREADABLE
from model_runner.lora.adapter import MAX_RANK, Delta, Deltas
from model_runner.lora.catalogue import Catalogue
from model_runner.lora.formats.landing import Landing

ALIGNMENT = 64
FIXED_SIZE = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
"""Memory that shrinks under a mapping kills whoever reads it, so a parcel is sealed."""


class Part(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Slice `index` of a site: its rank, and the byte offsets of A [rank, in] and B [rank, out of the slice]."""

    site: str
    index: int
    rank: int
    a: int
    b: int


class Label(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What the parts are, and what they were read from."""

    revision: str
    cast_from: list[str]
    parts: list[Part]


@dataclass
class Parcel:
    """The descriptor of the memory, owned until it is opened or closed; tensors first, then the label."""

    descriptor: int
    tensors: int
    label: int

    def open(self, catalogue: Catalogue, dtype: torch.dtype) -> tuple[Label, Deltas]:
        """The label, and the adapter as views of the memory, which lives as long as any of them. Closes the parcel.

        Raises AdapterError for sizes and a label that do not fit the memory or the model.
        """
        try:
            size = os.fstat(self.descriptor).st_size
            if self.tensors <= 0 or self.label <= 0 or self.tensors + self.label != size or self.tensors % ALIGNMENT:
                raise AdapterError(f"its memory of {size} bytes is not {self.tensors} and {self.label}")
            if fcntl.fcntl(self.descriptor, fcntl.F_GET_SEALS) & FIXED_SIZE != FIXED_SIZE:
                raise AdapterError("its memory can change its size")
            label = msgspec.msgpack.decode(os.pread(self.descriptor, self.label, self.tensors), type=Label)
            return label, views(map_memory(self.descriptor, self.tensors), label.parts, catalogue, dtype)
        except (*UNREADABLE, OSError) as error:
            raise AdapterError(f"its memory cannot be read ({error})") from error
        finally:
            self.close()

    def close(self) -> None:
        """Gives the descriptor back; twice is harmless."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def arrange(landings: Iterable[Landing], dtype: torch.dtype) -> tuple[list[Part], int]:
    """Where each half of these modules goes, and how many bytes all of them take."""
    parts, end = [], 0
    for landing in landings:
        place, rank = landing.place, landing.target.rank
        a, b = end, _aligned(end + rank * place.in_features * dtype.itemsize)
        parts.append(Part(place.site.name, place.index, rank, a, b))
        end = _aligned(b + rank * place.out_features * dtype.itemsize)
    return parts, end


def allocate(size: int) -> int:
    """The descriptor of `size` zero bytes of memory that has no name."""
    descriptor = os.memfd_create("adapter", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, size)
    return descriptor


def seal(descriptor: int, tensors: int, label: Label) -> Parcel:
    """Puts the label behind the tensors and fixes the size."""
    raw = msgspec.msgpack.encode(label)
    written = os.pwrite(descriptor, raw, tensors)
    assert written == len(raw), "memory takes all or raises"
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, FIXED_SIZE)
    return Parcel(descriptor, tensors, len(raw))


def map_memory(descriptor: int, size: int) -> torch.Tensor:
    """[size] bytes, shared; the mapping needs no descriptor and lives as long as the tensor and its views."""
    storage = torch.UntypedStorage.from_file(f"/proc/self/fd/{descriptor}", True, size)
    return torch.empty(0, dtype=torch.uint8).set_(storage)  # type: ignore[arg-type]


def views(memory: torch.Tensor, parts: Iterable[Part], catalogue: Catalogue, dtype: torch.dtype) -> Deltas:
    """The parts as tensors. Raises AdapterError for a part that is not inside the memory or not of this model."""
    values = memory.view(dtype)
    found: dict[str, list[Delta | None]] = {}
    for part in parts:
        site = catalogue.sites.get(part.site)
        if site is None or not 0 <= part.index < len(site.slices) or not 1 <= part.rank <= MAX_RANK:
            raise AdapterError(f"{part} is not of this model")
        a = _view(values, part.a, part.rank, site.in_features)
        b = _view(values, part.b, part.rank, site.slices[part.index].width)
        slices = found.setdefault(site.name, [None] * len(site.slices))
        slices[part.index] = Delta(a, b)
    return {name: tuple(slices) for name, slices in found.items()}


def _view(values: torch.Tensor, offset: int, rows: int, columns: int) -> torch.Tensor:
    if offset < 0 or offset % ALIGNMENT or offset + rows * columns * values.itemsize > values.nbytes:
        raise AdapterError(f"[{rows}, {columns}] at byte {offset} is not inside its memory")
    return values.as_strided((rows, columns), (columns, 1), offset // values.itemsize)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
