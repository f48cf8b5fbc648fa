"""The weights of the base model, for formats whose normal form depends on them (DoRA, trained biases).

They are the model's own where it was loaded in this process, else its checkpoint's, mapped and never copied: they lie
in the page cache, which all processes share. Knows nothing of adapters. Legend: I in features, O columns of a slice.
"""

from __future__ import annotations

import mmap
import warnings
from pathlib import Path

import torch

from engine.errors import AdapterError, ConfigError
from model_runner.lora.catalogue import SiteRef
from model_runner.lora.files.regular_file import open_regular
from model_runner.lora.files.tensor_file import FLOATS, TensorFile, open_tensors
from model_runner.lora.formats.dora import row_squares
from model_runner.weights.checkpoint import checkpoint_files

TIED = {"lm_head.weight": "model.embed_tokens.weight"}
"""The tensor that stands for another where a checkpoint has it once."""


class BaseWeights:
    """`directory`: the model's, needed where the sites have no weights."""

    def __init__(self, directory: Path | None = None) -> None:
        self._directory = directory
        self._files: dict[str, TensorFile] | None = None
        self._mapped: dict[Path, torch.Tensor] = {}
        self._squares: dict[str, torch.Tensor] = {}

    def weight(self, place: SiteRef) -> torch.Tensor:
        """[O, I], for the embedding too. Raises AdapterError where it cannot be had."""
        site, piece = place.site, place.slice
        if site.base.device.type != "meta":
            return site.base.dequantize().t() if site.embeds else site.base.dequantize(slice(piece.start, piece.stop))
        weight = self._read(f"{place.module}.weight", [place.out_features, place.in_features], turned=site.embeds)
        return weight.t() if site.embeds else weight

    def squares(self, place: SiteRef) -> torch.Tensor:
        """[O] float32: |W|^2 by row, computed once."""
        if place.module not in self._squares:
            self._squares[place.module] = row_squares(self.weight(place))
        return self._squares[place.module]

    def bias(self, place: SiteRef) -> torch.Tensor | None:
        """[O], or None where the model has none."""
        site, piece = place.site, place.slice
        if site.base.device.type != "meta":
            return None if site.base.bias is None else site.base.bias[piece.start : piece.stop]
        if f"{place.module}.bias" not in self._index():
            return None
        return self._read(f"{place.module}.bias", [place.out_features])

    def _read(self, name: str, shape: list[int], *, turned: bool = False) -> torch.Tensor:
        index = self._index()
        name = name if name in index else TIED.get(name, name)
        file = index.get(name)
        expected = shape[::-1] if turned else shape
        if file is None or file.entries[name].shape != expected or file.entries[name].dtype not in FLOATS:
            raise AdapterError(f"the base model's checkpoint has no tensor {name} of shape {expected}, which it needs")
        entry = file.entries[name]
        begin, end = (len(file.head) + offset for offset in entry.data_offsets)
        raw = self._map(file.path)[begin:end]
        if begin % FLOATS[entry.dtype].itemsize:
            raw = raw.clone()
        return raw.view(FLOATS[entry.dtype]).view(entry.shape)

    def _index(self) -> dict[str, TensorFile]:
        if self._files is None:
            try:
                files = [] if self._directory is None else checkpoint_files(self._directory)
            except ConfigError as error:
                raise AdapterError(f"the base model cannot be read ({error.message})") from error
            self._files = {name: file for path in files for file in [open_tensors(path)] for name in file.entries}
        return self._files

    def _map(self, path: Path) -> torch.Tensor:
        """[bytes] of the whole file, to be read only."""
        if path not in self._mapped:
            with open_regular(path) as file, warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch knows no tensors that must not be written
                self._mapped[path] = torch.frombuffer(
                    mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=torch.uint8
                )
        return self._mapped[path]
