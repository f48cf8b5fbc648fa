"""An adapter in the normal form as one piece of shared memory, to be handed from one process to another.

    | A | B | gain | bias | A | B .. | label       each piece at a multiple of 64 bytes; the label says where
    |<--------- `tensors` bytes ---->|

The memory has no name: it is given back when the last mapping and descriptor of it are gone. Whoever receives one
trusts nothing: every number is checked before a view is made. Knows nothing of processes.
"""

from __future__ import annotations

import fcntl
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass

import msgspec
import torch

from engine.errors import AdapterError
from engine.ipc import UNREADABLE
from model_runner.lora.catalogue import Catalogue
from model_runner.lora.normal_form import MAX_RANK, Delta, Deltas
from model_runner.lora.peft.tensor_mapping import TensorMapping
from model_runner.lora.site import NORMS, Site

ALIGNMENT = 64
VECTOR = torch.float32
"""What gains and biases are held in."""

FIXED_SIZE = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
"""Memory that shrinks under a mapping kills whoever reads it, so a parcel is sealed."""


class Part(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Slice `index` of a site: its rank, and the byte offsets of A [rank, in] and B [rank, out of the slice].

    Of the gain and the bias too, float32 [out of the slice], and of a whole matrix, where there are such; it is shaped
    like the base's, but for its `rows` where they are not 0.
    """

    site: str
    index: int
    rank: int
    a: int
    b: int
    gain: int | None = None
    bias: int | None = None
    whole: int | None = None
    rows: int = 0


class Label(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What the parts are, and what they were read from."""

    revision: str
    cast_from: list[str]
    parts: list[Part]
    invocation: list[int] = []


@dataclass
class ShmAdapter:
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


def arrange(mappings: Iterable[TensorMapping], dtype: torch.dtype) -> tuple[list[Part], int]:
    """Where each piece of these modules goes, and how many bytes all of them take."""
    parts, end = [], 0

    def take(elements: int, itemsize: int) -> int:
        nonlocal end
        begin, end = end, _aligned(end + elements * itemsize)
        return begin

    for mapping in mappings:
        for ref in mapping.refs:
            rank, out = mapping.rank, ref.out_features
            a, b = take(rank * ref.in_features, dtype.itemsize), take(rank * out, dtype.itemsize)
            gain = take(out, VECTOR.itemsize) if mapping.has_gain else None
            bias = take(out, VECTOR.itemsize) if mapping.has_bias else None
            shape = _shape(ref.site, mapping.rows)
            whole = take(math.prod(shape), dtype.itemsize) if mapping.has_full_weight else None
            parts.append(Part(ref.site.name, ref.index, rank, a, b, gain, bias, whole, mapping.rows))
    return parts, end


def allocate(size: int) -> int:
    """The descriptor of `size` zero bytes of memory that has no name."""
    descriptor = os.memfd_create("adapter", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, size)
    return descriptor


def seal(descriptor: int, tensors: int, label: Label) -> ShmAdapter:
    """Puts the label behind the tensors and fixes the size."""
    raw = msgspec.msgpack.encode(label)
    written = os.pwrite(descriptor, raw, tensors)
    assert written == len(raw), "memory takes all or raises"
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, FIXED_SIZE)
    return ShmAdapter(descriptor, tensors, len(raw))


def map_memory(descriptor: int, size: int) -> torch.Tensor:
    """[size] bytes, shared; the mapping needs no descriptor and lives as long as the tensor and its views."""
    storage = torch.UntypedStorage.from_file(f"/proc/self/fd/{descriptor}", True, size)
    return torch.empty(0, dtype=torch.uint8).set_(storage)  # type: ignore[arg-type]


def views(memory: torch.Tensor, parts: Iterable[Part], catalogue: Catalogue, dtype: torch.dtype) -> Deltas:
    """The parts as tensors. Raises AdapterError for a part that is not inside the memory or not of this model."""
    values, wide = memory.view(dtype), memory.view(VECTOR)
    found: dict[str, list[Delta | None]] = {}
    for part in parts:
        site = catalogue.sites.get(part.site)
        if site is None or not 0 <= part.index < len(site.slices) or not 0 <= part.rank <= MAX_RANK:
            raise AdapterError(f"{part} is not of this model")
        out = site.slices[part.index].width
        a = _view(values, part.a, part.rank, site.in_features)
        b = _view(values, part.b, part.rank, out)
        gain, bias = (None if at is None else _view(wide, at, 1, out)[0] for at in (part.gain, part.bias))
        slices = found.setdefault(site.name, [None] * len(site.slices))
        if part.whole is not None and (not site.replaceable or part.rows < 0 or (part.rows and site.group == NORMS)):
            raise AdapterError(f"{part} is not of this model")
        shape = _shape(site, part.rows)
        whole = None if part.whole is None else _view(values, part.whole, 1, math.prod(shape)).view(shape)
        slices[part.index] = Delta(a, b, gain, bias, whole)
    return {name: tuple(slices) for name, slices in found.items()}


def _shape(site: Site, rows: int) -> list[int]:
    """Of a whole weight, with `rows` of its own or, where they are 0, the base's."""
    return [rows or site.base.shape[0], *site.base.shape[1:]]


def _view(values: torch.Tensor, offset: int, rows: int, columns: int) -> torch.Tensor:
    if offset < 0 or offset % ALIGNMENT or offset + rows * columns * values.itemsize > values.nbytes:
        raise AdapterError(f"[{rows}, {columns}] at byte {offset} is not inside its memory")
    return values.as_strided((rows, columns), (columns, 1), offset // values.itemsize)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
