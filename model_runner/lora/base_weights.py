"""The weights of the base model, for formats whose normal form depends on them (DoRA, trained biases).

Where the model is loaded in this process, its loaded weights are used; elsewhere the checkpoint's files are mapped, so
that all processes share them in the page cache. Does not depend on adapters. Legend: I in features, O output columns of
a slice.
"""

from __future__ import annotations

import mmap
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.directory import Directory
from engine.errors import AdapterError, ConfigError
from model_runner.lora.catalogue import SiteRef
from model_runner.lora.files.tensor_file import FLOATS, TensorFile, open_tensors
from model_runner.lora.variants.dora import row_squares
from model_runner.weights.checkpoint import checkpoint_files

TIED = {"lm_head.weight": "model.embed_tokens.weight"}
"""The tied tensor to read instead, for each tensor that a checkpoint may lack."""


@dataclass(frozen=True, eq=False)
class MappedFile:
    """A file of the checkpoint: its parsed header, and the whole file as a read-only tensor of bytes."""

    header: TensorFile
    content: torch.Tensor


class BaseWeights:
    """Reads the base's weights on demand. `directory`: the model's, needed where the sites are on the meta device."""

    def __init__(self, directory: Path | None = None) -> None:
        self.directory = directory
        self._files: dict[str, MappedFile] | None = None
        self._squares: dict[str, torch.Tensor] = {}

    def weight(self, ref: SiteRef) -> torch.Tensor:
        """Returns the slice's weight [O, I], also for the embedding. Raises AdapterError if the checkpoint lacks it."""
        site, piece = ref.site, ref.slice
        if site.base.device.type != "meta":
            return site.base.dequantize().t() if site.embeds else site.base.dequantize(slice(piece.start, piece.stop))
        weight = self._read(f"{ref.module}.weight", [ref.out_features, ref.in_features], transposed=site.embeds)
        return weight.t() if site.embeds else weight

    def squares(self, ref: SiteRef) -> torch.Tensor:
        """Returns |W|^2 of each row, [O] float32, which is computed once for all adapters."""
        if ref.module not in self._squares:
            self._squares[ref.module] = row_squares(self.weight(ref))
        return self._squares[ref.module]

    def bias(self, ref: SiteRef) -> torch.Tensor | None:
        """Returns the slice's bias [O], or None if the model has none."""
        site, piece = ref.site, ref.slice
        if site.base.device.type != "meta":
            return None if site.base.bias is None else site.base.bias[piece.start : piece.stop]
        if f"{ref.module}.bias" not in self._index():
            return None
        return self._read(f"{ref.module}.bias", [ref.out_features])

    def _read(self, name: str, shape: list[int], *, transposed: bool = False) -> torch.Tensor:
        index = self._index()
        name = name if name in index else TIED.get(name, name)
        file = index.get(name)
        expected = shape[::-1] if transposed else shape
        entry = None if file is None else file.header.entries[name]
        if file is None or entry is None or entry.shape != expected or entry.dtype not in FLOATS:
            raise AdapterError(f"the base model's checkpoint has no tensor {name} of shape {expected}, which it needs")
        begin, end = (len(file.header.head) + offset for offset in entry.data_offsets)
        raw = file.content[begin:end]
        if begin % FLOATS[entry.dtype].itemsize:
            raw = raw.clone()
        return raw.view(FLOATS[entry.dtype]).view(entry.shape)

    def _index(self) -> dict[str, MappedFile]:
        if self._files is None:
            try:
                files = [] if self.directory is None else _map_files(self.directory)
            except ConfigError as error:
                raise AdapterError(f"the base model cannot be read ({error.message})") from error
            self._files = {name: file for file in files for name in file.header.entries}
        return self._files


def _map_files(model: Path) -> list[MappedFile]:
    names = [path.name for path in checkpoint_files(model)]
    with Directory(model) as directory:
        return [_map(directory, name) for name in names]


def _map(directory: Directory, name: str) -> MappedFile:
    """Maps a file of the checkpoint. The mapping stays valid after the directory is closed."""
    file = directory.open(name)
    header = open_tensors(file, name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about read-only buffers
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return MappedFile(header, torch.frombuffer(mapped, dtype=torch.uint8))


@dataclass(frozen=True, eq=False)
class ModuleSlice:
    """The base's weights of one slice of `module`. `bias_tensor`: the name of the adapter's bias tensor, for errors."""

    base: BaseWeights
    ref: SiteRef
    module: str
    bias_tensor: str

    @property
    def out_features(self) -> int:
        """O, the output columns of the slice."""
        return self.ref.out_features

    def weight(self) -> torch.Tensor:
        """Returns the base's weight of the slice, [O, I]. Raises AdapterError if the checkpoint lacks it."""
        return self.base.weight(self.ref)

    def row_squares(self) -> torch.Tensor:
        """Returns |W|^2 of each row of the slice, [O] float32."""
        return self.base.squares(self.ref)

    def bias(self) -> torch.Tensor:
        """Returns the base's bias of the slice, [O]. Raises AdapterError if the model has none."""
        bias = self.base.bias(self.ref)
        if bias is None:
            raise AdapterError(f"tensor {self.bias_tensor}: module {self.module} of the model has no bias")
        return bias
