"""Adapter names and what they stand for at the moment; who still uses an entry is counted in it.

    name --alias--> Entry(adapter_id, state, in_flight) <--held by-- open requests

A request holds the entry it resolved, not the name: a name that later points elsewhere, or is removed, does not touch
what is in flight. Knows nothing of HTTP, text or the scheduler; loads go out through the function that it is given.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import msgspec

from engine.config import AdapterSource
from engine.errors import AdapterError, InvalidRequest, NotFound
from engine.messages import AdapterCard, AdapterMix, AdapterState, LoadAdapter

log = logging.getLogger(__name__)


class Entry:
    """One adapter under its id, which is never reused."""

    def __init__(self, source: AdapterSource) -> None:
        self.source = source
        self.state = AdapterState(adapter_id=source.adapter_id, state="loading")
        self.in_flight = 0
        self.created = int(time.time())

    @property
    def is_loaded(self) -> bool:
        """Its weights are in the host tier or nearer."""
        return self.state.state in ("host", "resident")

    def card(self, parent: str) -> AdapterCard:
        """What is told about it; `parent` is the base it says it belongs to, else the one that is served."""
        state = self.state
        return AdapterCard(
            name=self.source.name,
            adapter_id=self.source.adapter_id,
            path=self.source.path,
            root=self.source.root,
            parent=self.source.base or parent,
            revision=state.revision,
            state=state.state,
            pinned=self.source.pinned,
            lora_rank=state.lora_rank,
            target_modules=state.target_modules,
            bytes=state.bytes,
            running=self.in_flight,
            created=self.created,
        )


class Voice(msgspec.Struct, frozen=True):
    """What one request runs through: entries with their scales; none = the base."""

    parts: list[tuple[Entry, float]] = []

    @property
    def lora(self) -> list[tuple[int, float]]:
        """The selection as the scheduler knows it."""
        return [(entry.source.adapter_id, scale) for entry, scale in self.parts]

    @property
    def names(self) -> list[str]:
        """The adapters by name."""
        return [entry.source.name for entry, _ in self.parts]

    @property
    def pages(self) -> dict[str, int]:
        """Rank pages a lane of it takes in each group, as far as the footprints are known."""
        pages: dict[str, int] = {}
        for entry, _ in self.parts:
            for group, count in entry.state.footprint.pages.items():
                pages[group] = pages.get(group, 0) + count
        return pages

    @property
    def failure(self) -> str | None:
        """Why one of its adapters cannot be served any more."""
        for entry, _ in self.parts:
            if entry.state.state == "failed":
                return f"adapter `{entry.source.name}`: {entry.state.error or 'it could not be loaded'}"
        return None

    @contextlib.contextmanager
    def held(self, count: int = 1) -> Iterator[None]:
        """Counts `count` requests as users of every part while entered."""
        for entry, _ in self.parts:
            entry.in_flight += count
        try:
            yield
        finally:
            for entry, _ in self.parts:
                entry.in_flight -= count


class AdapterDirectory:
    """All adapters by name and by id. `base_names` are what the base model is called, the first one first."""

    def __init__(self, base_names: Sequence[str], sources: Sequence[AdapterSource] = ()) -> None:
        self.base_names = list(base_names)
        entries = [Entry(source) for source in sources]
        self._by_name = {entry.source.name: entry for entry in entries}
        self._by_id = {entry.source.adapter_id: entry for entry in entries}
        assert len(self._by_name) == len(self._by_id) == len(entries), "names and ids of adapters are unique"

    def load(self, send: Callable[[LoadAdapter], None]) -> None:
        """Asks for every adapter to be brought to the host tier; asking again is harmless."""
        for entry in self._by_id.values():
            source = entry.source
            send(LoadAdapter(adapter_id=source.adapter_id, path=source.root, pinned=source.pinned))

    def handle(self, state: AdapterState) -> None:
        """News of one adapter; an entry that is gone is forgotten."""
        entry = self._by_id.get(state.adapter_id)
        if entry is None:
            log.warning("state %s of an unknown adapter %d", state.state, state.adapter_id)
            return
        entry.state = state
        if state.state == "gone":
            del self._by_id[state.adapter_id]
            if self._by_name.get(entry.source.name) is entry:
                del self._by_name[entry.source.name]

    @property
    def failure(self) -> AdapterError | None:
        """The first adapter that could not be loaded, as an error that names it."""
        for entry in self._by_id.values():
            if (text := Voice([(entry, 1.0)]).failure) is not None:
                return AdapterError(text, param="lora_path")
        return None

    @property
    def is_ready(self) -> bool:
        """Every adapter has reached the host tier."""
        return all(entry.is_loaded for entry in self._by_id.values())

    def names_of(self, ids: Sequence[int]) -> list[str]:
        """Names of adapter ids, sorted; ids that are gone are left out."""
        return sorted(self._by_id[each].source.name for each in ids if each in self._by_id)

    def by_name(self, counts: Mapping[int, int]) -> dict[str, int]:
        """Counts by adapter id as counts by name, without zeros."""
        return {self._by_id[each].source.name: count for each, count in counts.items() if count and each in self._by_id}

    def cards(self) -> list[AdapterCard]:
        """All adapters, in the order they came."""
        return [entry.card(self.base_names[0]) for entry in self._by_id.values()]

    def card(self, name: str) -> AdapterCard | None:
        """One adapter by its name."""
        entry = self._by_name.get(name)
        return None if entry is None else entry.card(self.base_names[0])

    def select(self, model: str | None, lora_path: str | AdapterMix | None = None) -> str | AdapterMix | None:
        """What `model` and `lora_path` together name, as Submit.lora takes it; None is the base.

        Raises NotFound for unknown names, InvalidRequest where the two disagree.
        """
        named = self._in_model(model)
        if lora_path is None:
            return named
        self.resolve(lora_path)
        if named is not None and lora_path not in (named, {named: 1.0}):
            raise InvalidRequest(
                f"`model` names the adapter `{named}` and `lora_path` names {_quoted(lora_path)}: name one",
                param="lora_path",
            )
        return lora_path if named is None else named

    def resolve(self, lora: str | AdapterMix | None) -> Voice:
        """The entries a selection stands for now. Raises NotFound or InvalidRequest with param lora_path."""
        if lora is None:
            return Voice()
        mix = {lora: 1.0} if isinstance(lora, str) else lora
        if not mix:
            raise InvalidRequest("the adapter mix is empty: leave it out for the base model", param="lora_path")
        for name, scale in mix.items():
            if not math.isfinite(scale):
                raise InvalidRequest(f"the scale of adapter `{name}` is {scale}, not a number", param="lora_path")
        return Voice([(self._entry(name), scale) for name, scale in mix.items()])

    def _entry(self, name: str) -> Entry:
        entry = self._by_name.get(name)
        if entry is None:
            raise NotFound(f"The adapter `{name}` does not exist. {self._known()}", param="lora_path")
        return entry

    def _in_model(self, model: str | None) -> str | None:
        """The adapter that `model` names: by itself, or behind a base name and a colon. The longest name wins."""
        if model is None or model in self.base_names:
            return None
        if model in self._by_name:
            return model
        for base in sorted(self.base_names, key=len):  # the shorter the base, the longer the adapter's name
            if model.startswith(base + ":") and model[len(base) + 1 :] in self._by_name:
                return model[len(base) + 1 :]
        raise NotFound(f"The model `{model}` does not exist. {self._known()}", param="model", code="model_not_found")

    def _known(self) -> str:
        names = [*self.base_names, *self._by_name]
        shown = ", ".join(f"`{name}`" for name in names[:8])
        return f"Known: {shown}{', ...' if len(names) > 8 else ''}; GET /v1/models lists them all."


def _quoted(lora: str | AdapterMix) -> str:
    return " + ".join(f"`{name}`" for name in ([lora] if isinstance(lora, str) else lora))
