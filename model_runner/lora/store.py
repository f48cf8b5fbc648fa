"""The host tier: adapters by id in the normal form; equal files share one copy."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from engine.directory import Directory
from engine.errors import AdapterError, StorageFailed
from model_runner.lora.catalogue import Catalogue
from model_runner.lora.loading.adapter_reader import AdapterReader, files_changed
from model_runner.lora.loading.limits import Limits
from model_runner.lora.loading.shm_adapter import ShmAdapter
from model_runner.lora.normal_form import Deltas, NormalForm, footprint, vocabulary
from model_runner.lora.peft.survey import AdapterSurvey
from model_runner.lora.site import Site

log = logging.getLogger(__name__)

MAX_MESSAGE = 600


class AdapterStore:
    """The adapters in host memory. `load` reads one in this process, `keep` adds one that a loader child has read.

    `max_rank` and `targets` are limits for adapters; None: no limit. `model` is the model's directory,
    `served_names` are the names under which it is served.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        dtype: torch.dtype,
        *,
        max_rank: int | None,
        targets: list[str] | None,
        biases: bool = True,
        extra_vocab: int | None = None,
        model: Path | None = None,
        served_names: Sequence[str] = (),
    ) -> None:
        self.dtype = dtype
        self.limits = Limits(max_rank, targets, biases, extra_vocab)
        self.catalogue = Catalogue(sites)
        self.reader = AdapterReader(self.catalogue, dtype, self.limits, model, served_names)
        self._adapters: dict[int, NormalForm] = {}

    def load(self, adapter_id: int, name: str, root: Path, revision: str = "", roots: Sequence[str] = ()) -> NormalForm:
        """Reads the adapter in `root` in this process, unless `adapter_id` is in the store.

        `revision`, when not empty, must be the hash of the files; with `roots` the files must lie under one of these
        directories. Raises AdapterError with one line: the adapter's name, the part at fault and the reason.
        """
        known = self.known(adapter_id, name, revision)
        if known is not None:
            return known
        try:
            with Directory(root, roots) as directory:
                shm = self.reader.read(self.reader.survey(directory), revision)
        except (AdapterError, StorageFailed, OSError) as error:
            raise refusal(name, error) from error
        return self.keep(adapter_id, name, shm)

    def survey(self, name: str, root: Path, roots: Sequence[str] = ()) -> AdapterSurvey:
        """Checks everything but the tensor values of the adapter in `root`, and adds nothing. Raises AdapterError."""
        try:
            with Directory(root, roots) as directory:
                return self.reader.survey(directory)
        except (AdapterError, StorageFailed, OSError) as error:
            raise refusal(name, error) from error

    def known(self, adapter_id: int, name: str, revision: str) -> NormalForm | None:
        """Returns the adapter, or None if it is not in the store. Raises AdapterError if it has another revision."""
        adapter = self._adapters.get(adapter_id)
        if adapter is not None and revision and adapter.revision != revision:
            raise refusal(name, files_changed(adapter.revision, revision))
        return adapter

    def keep(self, adapter_id: int, name: str, shm: ShmAdapter) -> NormalForm:
        """Adds an adapter that was read here or in a child. Raises AdapterError if its memory is invalid."""
        try:
            manifest, opened = shm.open(self.catalogue, self.dtype)
        except AdapterError as error:
            raise refusal(name, error) from error
        deltas = self._shared(manifest.revision) or opened
        present = [delta for slices in deltas.values() for delta in slices if delta is not None]
        sites = self.catalogue.sites
        adapter = NormalForm(
            adapter_id=adapter_id,
            name=name,
            revision=manifest.revision,
            rank=max(delta.rank for delta in present),
            targets=sorted({sites[part.site].slices[part.index].module for part in manifest.parts}),
            footprint=footprint(deltas, sites),
            deltas=deltas,
            bytes=sum(delta.bytes for delta in present),
            cast_from=manifest.cast_from,
            vocab_size=vocabulary(deltas, sites),
            invocation=manifest.invocation,
            notes=manifest.notes,
        )
        if adapter.cast_from:
            log.info("adapter %r: %s weights are served in %s", name, ", ".join(adapter.cast_from), self.dtype)
        for note in manifest.notes:
            log.warning("adapter %r: %s", name, note)
        self._adapters[adapter_id] = adapter
        return adapter

    def get(self, adapter_id: int) -> NormalForm | None:
        """Returns the adapter, or None if it is not in the store."""
        return self._adapters.get(adapter_id)

    def drop(self, adapter_id: int) -> None:
        """Frees the adapter's host memory, if it is in the store."""
        self._adapters.pop(adapter_id, None)

    def __iter__(self) -> Iterator[NormalForm]:
        return iter(list(self._adapters.values()))

    def __len__(self) -> int:
        return len(self._adapters)

    def _shared(self, revision: str) -> Deltas | None:
        """Returns the deltas of a stored adapter with this revision, or None if there is none."""
        return next((known.deltas for known in self._adapters.values() if known.revision == revision), None)


def refusal(name: str, reason: Exception) -> AdapterError:
    """Returns an error of one line, clipped to MAX_MESSAGE: which adapter cannot be served, and why."""
    text = reason.message if isinstance(reason, AdapterError | StorageFailed) else str(reason)
    line = " ".join(f"adapter {name!r}: {text}".split())
    return AdapterError(line if len(line) <= MAX_MESSAGE else line[: MAX_MESSAGE - 3] + "...")
