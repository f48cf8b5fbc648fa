"""The registry of adapters: which entry each name refers to at the moment.

    name --alias--> Entry(adapter_id, state, in_flight) <--held by-- open requests

A request holds the entry that its name resolved to, not the name: re-pointing or removing a name does not affect
requests in flight. Messages to the scheduler are sent through functions that callers pass in.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from engine.config.lora_paths import adapter_of
from engine.config.process_configs import AdapterSource
from engine.errors import AdapterError, InvalidRequest, NotFound
from engine.messages import AdapterCard, AdapterMix, AdapterState, LoadAdapter, UnloadAdapter
from tokenizer_proc.adapters.entry import Entry
from tokenizer_proc.adapters.selection import AdapterSelection
from tokenizer_proc.adapters.tokenizers import TextTools

log = logging.getLogger(__name__)

_IDS_BY_EPOCH = 1 << 32  # ids of each epoch (restart of the process), so that an id is never reused after a restart
MAX_SCALE = 100.0  # a larger scale would make the LoRA delta overflow and the output noise


class UnknownModel(NotFound):
    """No base model or adapter has this name. The message lists some that there are."""

    def __init__(self, message: str, name: str, *, param: str | None, code: str | None) -> None:
        super().__init__(message, param=param, code=code)
        self.name = name

    def without_list(self) -> NotFound:
        """Returns the error for callers that may not use every model, which is also that for a hidden model."""
        text = f"`{self.name}` does not exist, or this key may not use it"
        return NotFound(text, param=self.param, code=self.code)


class AdapterRegistry:
    """All adapters by name and by id. `base_names` are the base model's names, the main name first."""

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
        """Sends a LoadAdapter for every adapter, which may be repeated without harm. Call `unload` afterwards.

        The scheduler then loads the adapters to the host. Failed adapters are left out, because a new scheduler would
        try to load them again.
        """
        for entry in self._by_id.values():
            if entry.state.state == "failed":
                continue
            source = entry.source
            send(
                LoadAdapter(
                    adapter_id=source.adapter_id,
                    path=source.root,
                    revision=entry.state.revision or source.revision,
                    pinned=source.pinned,
                    preload=entry.preload,
                    name=source.name,
                    roots=source.roots,
                )
            )

    def unload(self, send: Callable[[UnloadAdapter], None]) -> None:
        """Sends an UnloadAdapter for every draining adapter, which may be repeated without harm."""
        for entry in self._by_id.values():
            if entry.draining:
                send(UnloadAdapter(entry.source.adapter_id))

    def refuse(self, adapter_id: int, reason: str) -> None:
        """Makes an adapter failed for good, whatever its weights are: its text tools cannot be used."""
        self._by_id[adapter_id].refuse(reason)

    def accept_failed(self) -> list[str]:
        """No longer waits for the start-up adapters whose load failed. Returns the reasons.

        They keep their names, so that their requests fail with the reason and nothing else is served instead.
        """
        failed = [self._by_id[number] for number in self._starting if self._by_id[number].state.state == "failed"]
        self._starting -= {entry.source.adapter_id for entry in failed}
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
        """Adds and returns an entry with a new id. `name` refers to it only after `point`."""
        number = next(self._ids)
        source = AdapterSource(adapter_id=number, name=name, path=path, root=root, pinned=pinned, roots=list(roots))
        entry = Entry(source, preload, text_tools)
        self._by_id[entry.source.adapter_id] = entry
        return entry

    def point(self, entry: Entry) -> Entry | None:
        """Makes the entry's name refer to `entry`. Returns the name's former entry, now draining, or None."""
        old = self._by_name.get(entry.name)
        self._by_name[entry.name] = entry
        if old is not None:
            old.release()
        return old

    def take_name(self, name: str) -> Entry | None:
        """Removes a name. Returns the entry that the name referred to, now draining, or None for an unknown name."""
        entry = self._by_name.pop(name, None)
        if entry is not None:
            entry.release()
        return entry

    @contextlib.contextmanager
    def loading(self, name: str) -> Iterator[None]:
        """While entered, the NotFound error for the unknown `name` says that the adapter is still loading."""
        self._loading.add(name)
        try:
            yield
        finally:
            self._loading.discard(name)

    def handle(self, state: AdapterState) -> None:
        """Stores a new state of one adapter, and removes the adapter from the registry if the state is `gone`."""
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
        """The error of the first adapter that could not be loaded, or None if there is no such adapter."""
        for entry in self._by_id.values():
            if (text := AdapterSelection([(entry, 1.0)]).failure) is not None:
                return AdapterError(text, param="lora_path")
        return None

    @property
    def is_ready(self) -> bool:
        """Whether every start-up adapter has been loaded to the host."""
        return not self._starting

    def find(self, name: str) -> Entry | None:
        """Returns the entry that `name` refers to at the moment, or None."""
        return self._by_name.get(name)

    def entry(self, adapter_id: int) -> Entry | None:
        """Returns the entry of an adapter id, or None if the id is unknown or the adapter is gone."""
        return self._by_id.get(adapter_id)

    def by_name(self, counts: Mapping[int, int]) -> dict[str, int]:
        """Converts counts by adapter id to counts by adapter name, and leaves out zeros."""
        names: dict[str, int] = {}
        for adapter_id, count in counts.items():
            if count and adapter_id in self._by_id:
                name = self._by_id[adapter_id].name
                names[name] = names.get(name, 0) + count
        return names

    def names(self, lora: Iterable[tuple[int, float]]) -> list[str]:
        """Returns the names of the adapters in `lora`, including draining adapters, which have lost their names."""
        return [self._by_id[adapter_id].name for adapter_id, _ in lora if adapter_id in self._by_id]

    def stages(self) -> dict[str, str]:
        """Returns the state of every adapter that a name refers to, by name."""
        return {name: entry.stage for name, entry in self._by_name.items()}

    def footprints(self) -> list[dict[str, int]]:
        """Returns the rank pages by group of the adapters that names refer to, as far as they are known."""
        known = [entry.state.footprint.pages for entry in self._by_name.values()]
        return [pages for pages in known if pages]

    def pinned(self) -> set[str]:
        """Returns the names of the adapters that are pinned, or will be once they are loaded."""
        return {
            entry.name
            for entry in self._by_id.values()
            if entry.source.pinned and not entry.draining and entry.state.state != "failed"
        }

    def paths(self) -> dict[str, str]:
        """Returns the path of every name as the load call gave it, in the order of loading."""
        return {name: entry.source.path for name, entry in self._by_name.items()}

    def cards(self) -> list[AdapterCard]:
        """Returns the cards of the named adapters in the order of loading, then those of draining adapters.

        A draining adapter is left out if its name refers to another adapter by now.
        """
        leaving = {entry.name: entry for entry in self._by_id.values() if entry.draining}
        entries = {**self._by_name, **{name: entry for name, entry in leaving.items() if name not in self._by_name}}
        return [entry.card(self.base_names[0]) for entry in entries.values()]

    def card(self, name: str) -> AdapterCard | None:
        """Returns the card of the adapter that `name` refers to, else of the draining one that had it last, or None."""
        if name in self._by_name:
            return self._by_name[name].card(self.base_names[0])
        return next((card for card in self.cards() if card.name == name), None)

    # ------------------------------------------------------------------------------------------- resolving names

    def candidates(self, model: str | None, lora_path: str | AdapterMix | None) -> list[str]:
        """Returns the adapter names that `model` and `lora_path` refer to and that are unknown so far."""
        names = [] if lora_path is None else [lora_path] if isinstance(lora_path, str) else [*lora_path]
        meant = self.meaning(model)
        return [name for name in (*names, meant) if name and name not in self._by_name]

    def meaning(self, model: str | None) -> str | None:
        """Returns the adapter's name that `model` refers to, whether there is such an adapter or not; None: the base.

        `model` is an adapter's name, or a base name, a colon and an adapter's name. No adapter has a name of the second
        form, so which adapters there are does not change what a name refers to.
        """
        return None if model is None or model in self.base_names else adapter_of(model, self.base_names)

    def select(self, model: str | None, lora_path: str | AdapterMix | None = None) -> str | AdapterMix | None:
        """Returns the adapters that `model` and `lora_path` name, in the form of Submit.lora; None is the base model.

        Raises NotFound for unknown names, and InvalidRequest if `model` and `lora_path` name different adapters.
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
        """Returns the entries that the names in `lora` refer to now, with their scales.

        Raises NotFound for an unknown name, and InvalidRequest for an empty mix or a scale out of range; the error's
        `param` is lora_path.
        """
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
            raise self._missing(name, name, "adapter", "lora_path", None)
        return entry

    def _in_model(self, model: str | None) -> str | None:
        """Returns the name of the adapter that `model` selects, or None for the base model. Raises NotFound."""
        name = self.meaning(model)
        if name is None or name in self._by_name:
            return name
        raise self._missing(model or "", name, "model", "model", "model_not_found")

    def _missing(self, given: str, name: str, what: str, param: str, code: str | None) -> NotFound:
        """Returns the error for an adapter `name` that there is not, which the client gave as `given` in `param`."""
        if name in self._loading:
            text = f"The {what} `{given}` is still loading: it can be named once its load has been answered."
            return NotFound(text, param=param, code=code)
        return UnknownModel(f"The {what} `{given}` does not exist. {self._known()}", given, param=param, code=code)

    def _known(self) -> str:
        names = [*self.base_names, *self._by_name]
        shown = ", ".join(f"`{name}`" for name in names[:8])
        return f"Known: {shown}{', ...' if len(names) > 8 else ''}; GET /v1/models lists them all."


def _quoted(lora: str | AdapterMix) -> str:
    return " + ".join(f"`{name}`" for name in ([lora] if isinstance(lora, str) else lora))
