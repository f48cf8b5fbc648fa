"""An adapter in the normal form as one block of shared memory, to be sent from one process to another.

    | A | B | gain | bias | A | B .. | manifest       each tensor at a multiple of 64 bytes; the manifest says where
    |<------ `tensor_bytes` -------->|

The memory has no name: the kernel frees it with its last mapping and descriptor. The receiver checks every number of
the manifest before it makes a view.
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
from engine.ipc import DECODE_ERRORS
from model_runner.lora.catalogue import Catalogue
from model_runner.lora.normal_form import MAX_RANK, Delta, Deltas
from model_runner.lora.peft.tensor_mapping import TensorMapping
from model_runner.lora.site import NORMS, Site

ALIGNMENT = 64
VECTOR = torch.float32
"""The dtype of gains and biases."""

FIXED_SIZE = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
"""Seals that fix the size of the memory: reading a mapping of shrunk memory would kill the process."""


class Part(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Slice `index` of a site: its rank, and the byte offsets of A [rank, in] and B [rank, out of the slice].

    `gain`, `bias` (float32 [out of the slice]) and `full_weight` are offsets too; None: the slice has none. A full
    weight has the base's shape, but `rows` rows where `rows` is not 0.
    """

    site: str
    index: int
    rank: int
    a: int
    b: int
    gain: int | None = None
    bias: int | None = None
    full_weight: int | None = None
    rows: int = 0


class Manifest(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Where the parts are in the memory, with the revision, source dtypes and invocation tokens of the adapter.

    `notes` are for the log.
    """

    revision: str
    cast_from: list[str]
    parts: list[Part]
    invocation: list[int] = []
    notes: list[str] = []


@dataclass
class ShmAdapter:
    """The descriptor of the shared memory, which `open` and `close` close, and the sizes of tensors and manifest."""

    descriptor: int
    tensor_bytes: int
    manifest_bytes: int

    def open(self, catalogue: Catalogue, dtype: torch.dtype) -> tuple[Manifest, Deltas]:
        """Returns the manifest, and the adapter as views of the memory. Closes the descriptor.

        The memory lives as long as one of the views. Raises AdapterError for sizes and a manifest
        that do not fit the memory or the model.
        """
        try:
            size = os.fstat(self.descriptor).st_size
            self._check_sizes(size)
            if fcntl.fcntl(self.descriptor, fcntl.F_GET_SEALS) & FIXED_SIZE != FIXED_SIZE:
                raise AdapterError("its memory can change its size")
            manifest = msgspec.msgpack.decode(
                os.pread(self.descriptor, self.manifest_bytes, self.tensor_bytes), type=Manifest
            )
            return manifest, views(map_memory(self.descriptor, self.tensor_bytes), manifest.parts, catalogue, dtype)
        except (*DECODE_ERRORS, OSError) as error:
            raise AdapterError(f"its memory cannot be read ({error})") from error
        finally:
            self.close()

    def _check_sizes(self, size: int) -> None:
        both = (self.tensor_bytes, self.manifest_bytes)
        if min(both) <= 0 or sum(both) != size or self.tensor_bytes % ALIGNMENT:
            raise AdapterError(f"its memory of {size} bytes is not {self.tensor_bytes} and {self.manifest_bytes}")

    def close(self) -> None:
        """Closes the descriptor, if it is open."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def arrange(mappings: Iterable[TensorMapping], dtype: torch.dtype) -> tuple[list[Part], int]:
    """Returns the place of each tensor of these modules, and how many bytes all of them take."""
    parts, end = [], 0

    def reserve(elements: int, itemsize: int) -> int:
        nonlocal end
        begin, end = end, _aligned(end + elements * itemsize)
        return begin

    for mapping in mappings:
        for ref in mapping.refs:
            rank, out = mapping.rank, ref.out_features
            a, b = reserve(rank * ref.in_features, dtype.itemsize), reserve(rank * out, dtype.itemsize)
            gain = reserve(out, VECTOR.itemsize) if mapping.has_gain else None
            bias = reserve(out, VECTOR.itemsize) if mapping.has_bias else None
            shape = _shape(ref.site, mapping.rows)
            full_weight = reserve(math.prod(shape), dtype.itemsize) if mapping.has_full_weight else None
            parts.append(Part(ref.site.name, ref.index, rank, a, b, gain, bias, full_weight, mapping.rows))
    return parts, end


def allocate(size: int) -> int:
    """Allocates `size` zero bytes of shared memory. Returns their descriptor."""
    descriptor = os.memfd_create("adapter", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, size)
    return descriptor


def seal(descriptor: int, tensor_bytes: int, manifest: Manifest) -> ShmAdapter:
    """Writes the manifest after the tensors and seals the size of the memory."""
    raw = msgspec.msgpack.encode(manifest)
    written = os.pwrite(descriptor, raw, tensor_bytes)
    assert written == len(raw), "a write to memory is complete or raises"
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, FIXED_SIZE)
    return ShmAdapter(descriptor, tensor_bytes, len(raw))


def map_memory(descriptor: int, size: int) -> torch.Tensor:
    """Maps the memory as a tensor of [size] bytes. The mapping lives as long as the tensor and its views."""
    storage = torch.UntypedStorage.from_file(f"/proc/self/fd/{descriptor}", True, size)
    return torch.empty(0, dtype=torch.uint8).set_(storage)  # type: ignore[arg-type]


def views(memory: torch.Tensor, parts: Iterable[Part], catalogue: Catalogue, dtype: torch.dtype) -> Deltas:
    """Returns the parts as tensors. Raises AdapterError for a part outside of the memory or not of this model."""
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
        full_weight = _full_weight(values, part, site)
        slices[part.index] = Delta(a, b, gain, bias, full_weight)
    return {name: tuple(slices) for name, slices in found.items()}


def _full_weight(values: torch.Tensor, part: Part, site: Site) -> torch.Tensor | None:
    if part.full_weight is None:
        return None
    if not site.replaceable or part.rows < 0 or (part.rows and site.group == NORMS):
        raise AdapterError(f"{part} is not of this model")
    shape = _shape(site, part.rows)
    return _view(values, part.full_weight, 1, math.prod(shape)).view(shape)


def _shape(site: Site, rows: int) -> list[int]:
    """Returns the shape of a full weight: that of the base's weight, but with `rows` rows if `rows` is not 0."""
    return [rows or site.base.shape[0], *site.base.shape[1:]]


def _view(values: torch.Tensor, offset: int, rows: int, columns: int) -> torch.Tensor:
    if offset < 0 or offset % ALIGNMENT or offset + rows * columns * values.itemsize > values.nbytes:
        raise AdapterError(f"[{rows}, {columns}] at byte {offset} is not inside its memory")
    return values.as_strided((rows, columns), (columns, 1), offset // values.itemsize)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
