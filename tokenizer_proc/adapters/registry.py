"""Adapter names, and the entries that they stand for at the moment.

    name --alias--> Entry(adapter_id, state, in_flight) <--held by-- open requests

A request holds the entry it resolved, not the name: when a name is re-pointed or removed, requests in flight are not
touched. Knows nothing of HTTP, text or the scheduler's link; messages go out through the functions it is given.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from engine.config.process_configs import AdapterSource
from engine.errors import AdapterError, InvalidRequest, NotFound
from engine.messages import AdapterCard, AdapterMix, AdapterState, LoadAdapter, UnloadAdapter
from tokenizer_proc.adapters.entry import Entry
from tokenizer_proc.adapters.selection import AdapterSelection
from tokenizer_proc.adapters.tokenizers import TextTools

log = logging.getLogger(__name__)

_IDS_BY_EPOCH = 1 << 32  # an id is never reused, not even after a restart
MAX_SCALE = 100.0  # a larger scale makes the delta overflow, and the answer noise


class AdapterRegistry:
    """All adapters by name and by id. `base_names` are the base model's names, the main one first."""

    def __init__(
        self,
        base_names: Sequence[str],
        sources: Sequence[AdapterSource] = (),
        epoch: int = 0,
        text_tools: Mapping[int, TextTools] | None = None,
    ) -> None:
        self.base_names = list(base_names)
        entries = [Entry(source, text_tools=(text_tools or {}).get(source.adapter_id)) for source in sources]
        self._by_name = {entry.name: entry for entry in entries}
        self._by_id = {entry.source.adapter_id: entry for entry in entries}
        assert len(self._by_name) == len(self._by_id) == len(entries), "names and ids of adapters are unique"
        self._ids = itertools.count(max(max(self._by_id, default=0), epoch * _IDS_BY_EPOCH) + 1)
        self._starting = set(self._by_id)
        self._loading: set[str] = set()

    # ---------------------------------------------------------------------------------------------------- changes

    def load(self, send: Callable[[LoadAdapter], None]) -> None:
        """Asks the scheduler to load every adapter to the host; asking again is harmless. `unload` comes after.

        An adapter that failed is left out: a new scheduler would try to load it again.
        """
        for entry in self._by_id.values():
            if entry.state.state == "failed":
                continue
            source = entry.source
            send(
                LoadAdapter(
                    adapter_id=source.adapter_id,
                    path=source.root,
                    revision=entry.state.revision,
                    pinned=source.pinned,
                    preload=entry.preload,
                    name=source.name,
                    roots=source.roots,
                )
            )

    def unload(self, send: Callable[[UnloadAdapter], None]) -> None:
        """Asks the scheduler again to unload the adapters that drain; asking again is harmless."""
        for entry in self._by_id.values():
            if entry.draining:
                send(UnloadAdapter(entry.source.adapter_id))

    def give_up_failed(self) -> list[str]:
        """Forgets the start-up adapters that cannot be loaded; returns the reasons."""
        failed = [self._by_id[number] for number in self._starting if self._by_id[number].state.state == "failed"]
        for entry in failed:
            number = entry.source.adapter_id
            self._starting.discard(number)
            del self._by_id[number], self._by_name[entry.name]
        return [AdapterSelection([(entry, 1.0)]).failure or "" for entry in failed]

    def add(
        self,
        name: str,
        path: str,
        root: str,
        *,
        pinned: bool,
        preload: bool,
        text_tools: TextTools | None = None,
        roots: Sequence[str] = (),
    ) -> Entry:
        """Makes an entry with an id of its own; `point` gives it its name."""
        number = next(self._ids)
        source = AdapterSource(adapter_id=number, name=name, path=path, root=root, pinned=pinned, roots=list(roots))
        entry = Entry(source, preload, text_tools)
        self._by_id[entry.source.adapter_id] = entry
        return entry

    def point(self, entry: Entry) -> Entry | None:
        """Makes the entry's name mean it. Returns the entry that the name meant before, released."""
        old = self._by_name.get(entry.name)
        self._by_name[entry.name] = entry
        if old is not None:
            old.release()
        return old

    def take_name(self, name: str) -> Entry | None:
        """Removes a name. Returns the entry that it meant, released."""
        entry = self._by_name.pop(name, None)
        if entry is not None:
            entry.release()
        return entry

    @contextlib.contextmanager
    def loading(self, name: str) -> Iterator[None]:
        """While entered, a request for a name that means nothing yet is told that it is being loaded."""
        self._loading.add(name)
        try:
            yield
        finally:
            self._loading.discard(name)

    def handle(self, state: AdapterState) -> None:
        """Stores the state of one adapter; an entry that is gone is forgotten."""
        entry = self._by_id.get(state.adapter_id)
        if entry is None:
            log.warning("state %s of an unknown adapter %d", state.state, state.adapter_id)
            return
        if state.state == "gone":
            del self._by_id[state.adapter_id]
            if self._by_name.get(entry.name) is entry:
                del self._by_name[entry.name]
        entry.update(state)
        if entry.is_loaded:
            self._starting.discard(state.adapter_id)

    # ------------------------------------------------------------------------------------------------------ facts

    @property
    def failure(self) -> AdapterError | None:
        """An error that names the first adapter that could not be loaded; None: there is none."""
        for entry in self._by_id.values():
            if (text := AdapterSelection([(entry, 1.0)]).failure) is not None:
                return AdapterError(text, param="lora_path")
        return None

    @property
    def is_ready(self) -> bool:
        """Every start-up adapter has reached the host."""
        return not self._starting

    def find(self, name: str) -> Entry | None:
        """The entry that a name means now."""
        return self._by_name.get(name)

    def entry(self, adapter_id: int) -> Entry | None:
        """The entry of an id, until its adapter is gone."""
        return self._by_id.get(adapter_id)

    def by_name(self, counts: Mapping[int, int]) -> dict[str, int]:
        """Counts by adapter id turned into counts by name, without zeros."""
        names: dict[str, int] = {}
        for adapter_id, count in counts.items():
            if count and adapter_id in self._by_id:
                name = self._by_id[adapter_id].name
                names[name] = names.get(name, 0) + count
        return names

    def names(self, lora: Iterable[tuple[int, float]]) -> list[str]:
        """The adapters' names, also of those whose names were taken."""
        return [self._by_id[adapter_id].name for adapter_id, _ in lora if adapter_id in self._by_id]

    def stages(self) -> dict[str, str]:
        """The state of every adapter that can be named."""
        return {name: entry.stage for name, entry in self._by_name.items()}

    def pinned(self) -> set[str]:
        """The names that are pinned, or will be when their load has ended."""
        return {
            entry.name
            for entry in self._by_id.values()
            if entry.source.pinned and not entry.draining and entry.state.state != "failed"
        }

    def paths(self) -> dict[str, str]:
        """The path of every name, as given, in the order of loading."""
        return {name: entry.source.path for name, entry in self._by_name.items()}

    def cards(self) -> list[AdapterCard]:
        """The adapters in the order of loading, then the draining ones whose name means no other adapter."""
        leaving = {entry.name: entry for entry in self._by_id.values() if entry.draining}
        entries = {**self._by_name, **{name: entry for name, entry in leaving.items() if name not in self._by_name}}
        return [entry.card(self.base_names[0]) for entry in entries.values()]

    def card(self, name: str) -> AdapterCard | None:
        """The adapter of a name, or one that drains and had it last; None: there is none."""
        if name in self._by_name:
            return self._by_name[name].card(self.base_names[0])
        return next((card for card in self.cards() if card.name == name), None)

    # ------------------------------------------------------------------------------------------- resolving names

    def candidates(self, model: str | None, lora_path: str | AdapterMix | None) -> list[str]:
        """The adapter names that `model` and `lora_path` could mean and that mean nothing yet."""
        names = [] if lora_path is None else [lora_path] if isinstance(lora_path, str) else [*lora_path]
        return [name for name in (*names, *self.meanings(model)) if name and name not in self._by_name]

    def meanings(self, model: str | None) -> list[str]:
        """The adapter names that `model` stands for; empty for the base.

        An adapter is named by itself, or behind a base name and a colon. The longest known name wins; while none is
        known, every name that could be meant is returned.
        """
        if model is None or model in self.base_names:
            return []
        bases = sorted(self.base_names, key=len)  # the shorter the base, the longer the adapter's name
        names = [model, *(model[len(base) + 1 :] for base in bases if model.startswith(base + ":"))]
        known = [name for name in names if name in self._by_name]
        return known[:1] or [name for name in names if name]

    def select(self, model: str | None, lora_path: str | AdapterMix | None = None) -> str | AdapterMix | None:
        """The adapters that `model` and `lora_path` together name, as Submit.lora takes them; None is the base.

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

    def resolve(self, lora: str | AdapterMix | None) -> AdapterSelection:
        """The entries that the names in `lora` mean now. Raises NotFound or InvalidRequest with param lora_path."""
        if lora is None:
            return AdapterSelection()
        mix = {lora: 1.0} if isinstance(lora, str) else lora
        if not mix:
            raise InvalidRequest("the adapter mix is empty: leave it out for the base model", param="lora_path")
        for name, scale in mix.items():
            if not abs(scale) <= MAX_SCALE:  # also refuses NaN
                raise InvalidRequest(
                    f"the scale of adapter `{name}` is {scale}; it must be from {-MAX_SCALE} to {MAX_SCALE}",
                    param="lora_path",
                )
        return AdapterSelection([(self._entry(name), scale) for name, scale in mix.items()])

    def _entry(self, name: str) -> Entry:
        entry = self._by_name.get(name)
        if entry is None:
            raise NotFound(f"The adapter `{name}` {self._missing(name)}", param="lora_path")
        return entry

    def _in_model(self, model: str | None) -> str | None:
        """The adapter that `model` names; None is the base."""
        if model is None or model in self.base_names:
            return None
        for name in self.meanings(model):
            if name in self._by_name:
                return name
        raise NotFound(f"The model `{model}` {self._missing(model)}", param="model", code="model_not_found")

    def _missing(self, name: str) -> str:
        if name in self._loading:
            return "is still loading: it can be named once its load has been answered."
        return f"does not exist. {self._known()}"

    def _known(self) -> str:
        names = [*self.base_names, *self._by_name]
        shown = ", ".join(f"`{name}`" for name in names[:8])
        return f"Known: {shown}{', ...' if len(names) > 8 else ''}; GET /v1/models lists them all."


def _quoted(lora: str | AdapterMix) -> str:
    return " + ".join(f"`{name}`" for name in ([lora] if isinstance(lora, str) else lora))
