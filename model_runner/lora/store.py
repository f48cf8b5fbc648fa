"""The host tier: adapters by id in the normal form, checked against the operator's limits. Knows nothing of pages."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from engine.errors import AdapterError
from model_runner.lora.adapter import Adapter, Deltas, footprint
from model_runner.lora.catalogue import Catalogue
from model_runner.lora.formats import peft
from model_runner.lora.site import Site

log = logging.getLogger(__name__)

MAX_MESSAGE = 600


class AdapterStore:
    """Loads adapters and keeps them. `max_rank` and `targets` (names, or "all") None mean: no limit."""

    def __init__(
        self, sites: Sequence[Site], dtype: torch.dtype, *, max_rank: int | None, targets: list[str] | None
    ) -> None:
        self.max_rank = max_rank
        self.targets = targets
        self.dtype = dtype
        self._catalogue = Catalogue(sites)
        self._adapters: dict[int, Adapter] = {}

    def load(self, adapter_id: int, name: str, root: Path, revision: str = "") -> Adapter:
        """The adapter in `root` as `adapter_id`; doing it twice is harmless.

        `revision`, when not empty, must be what the files hash to. Raises AdapterError: one line with the adapter's
        name, the part at fault and the reason.
        """
        try:
            adapter = self._adapters.get(adapter_id) or self._read(adapter_id, name, root)
            if revision and adapter.revision != revision:
                raise AdapterError(f"{root}: its files have changed (revision {adapter.revision}, not {revision})")
        except AdapterError as error:
            raise AdapterError(_one_line(f"adapter {name!r}: {error.message}")) from error
        except OSError as error:
            raise AdapterError(_one_line(f"adapter {name!r}: {error}")) from error
        if adapter_id not in self._adapters and adapter.cast_from:
            log.info("adapter %r: %s weights are served in %s", name, ", ".join(adapter.cast_from), self.dtype)
        self._adapters[adapter_id] = adapter
        return adapter

    def get(self, adapter_id: int) -> Adapter | None:
        """The adapter, or None if it is not in the host tier."""
        return self._adapters.get(adapter_id)

    def drop(self, adapter_id: int) -> None:
        """Forgets the adapter and frees its host memory; an id that is not there is fine."""
        self._adapters.pop(adapter_id, None)

    def __iter__(self) -> Iterator[Adapter]:
        return iter(list(self._adapters.values()))

    def __len__(self) -> int:
        return len(self._adapters)

    def _read(self, adapter_id: int, name: str, root: Path) -> Adapter:
        survey = peft.survey(root, self._catalogue)
        self._check_limits(survey.rank, survey.targets)
        contents = survey.read(self.dtype)
        deltas = self._shared(contents.revision) or contents.deltas
        return Adapter(
            adapter_id=adapter_id,
            name=name,
            revision=contents.revision,
            rank=survey.rank,
            targets=survey.targets,
            footprint=footprint(deltas, self._catalogue.sites),
            deltas=deltas,
            bytes=sum(delta.bytes for slices in deltas.values() for delta in slices if delta is not None),
            cast_from=contents.cast_from,
        )

    def _check_limits(self, rank: int, targets: list[str]) -> None:
        if self.max_rank is not None and rank > self.max_rank:
            raise AdapterError(f"rank {rank} is above --max-lora-rank {self.max_rank}")
        if self.targets is None or "all" in self.targets:
            return
        refused = [target for target in targets if target not in self.targets]
        if refused:
            allowed = " ".join(self.targets)
            raise AdapterError(f"it targets {', '.join(refused)}, which --lora-target-modules {allowed} does not allow")

    def _shared(self, revision: str) -> Deltas | None:
        """Two names of the same bytes hold one copy."""
        return next((known.deltas for known in self._adapters.values() if known.revision == revision), None)


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= MAX_MESSAGE else line[: MAX_MESSAGE - 3] + "..."
