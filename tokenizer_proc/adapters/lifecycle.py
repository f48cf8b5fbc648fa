"""Loading, re-pointing, pinning and unloading adapters while requests run.

    load     source found -> LoadAdapter -> on the host -> recorded -> the name gets the new entry -> the old one drains
                                         -> failed: the name keeps its old entry, if it had one
    unload   recorded -> the name is removed -> UnloadAdapter -> the adapter's requests finish -> gone

A change is recorded in the journal before it takes effect; if that fails, nothing changes. Both happen without a pause,
so a successor of this process serves what was answered. Calls for the same name run one after the other, in order of
arrival; calls for different names run concurrently. Callers' rights are checked elsewhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator

import msgspec
from msgspec.structs import replace

from engine.config.lora_paths import adapter_of
from engine.config.process_configs import AdapterSource, TokenizerConfig
from engine.errors import AdapterError, EngineError, InvalidRequest, NotFound, StorageFailed
from engine.journal.journal import Journal
from engine.messages import LoadAdapter, PinAdapter, UnloadAdapter
from tokenizer_proc.adapters.calls import AdapterCalls, Call
from tokenizer_proc.adapters.entry import Entry
from tokenizer_proc.adapters.name_locks import NameLocks
from tokenizer_proc.adapters.registry import AdapterRegistry
from tokenizer_proc.adapters.sources import Sources
from tokenizer_proc.adapters.tokenizers import TokenizerLibrary
from tokenizer_proc.telemetry.metrics import Metrics

log = logging.getLogger(__name__)

LOADS_AT_ONCE = 8
LONGEST_NAME = 256
FREED_SECONDS = 60.0  # the longest time that an unload call waits for the adapter's memory to be free
PRELOAD_SECONDS = 60.0  # the longest time that a load call with `preload` waits for the adapter to be resident

ALREADY_LOADED = "adapter_already_loaded"


class LoadRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A load call. If the name is taken, `load_inplace` re-points it, and `if_missing` keeps its present adapter."""

    name: str
    path: str
    pinned: bool = False
    preload: bool = False
    load_inplace: bool = False
    if_missing: bool = False


class Lifecycle:
    """Runs adapter calls: changes the registry, and sends messages to the scheduler through `send`."""

    def __init__(
        self,
        config: TokenizerConfig,
        registry: AdapterRegistry,
        send: Callable[[msgspec.Struct], None],
        metrics: Metrics,
        library: TokenizerLibrary | None = None,
        journal: Journal | None = None,
    ) -> None:
        self._config = config
        self._registry = registry
        self._send = send
        self._metrics = metrics
        self._library = library
        self._sources = Sources(config.lora_roots)
        self._journal = journal or Journal()
        self.names = NameLocks()
        self._slots = asyncio.Semaphore(LOADS_AT_ONCE)
        self._calls = AdapterCalls()

    async def load(self, ask: LoadRequest, sources: Sources | None = None) -> Entry:
        """Loads an adapter and returns its entry, once requests can use its name.

        By then the adapter is on the host; with `preload` this also waits, for up to PRELOAD_SECONDS, until the adapter
        is resident. Raises NotFound if there is no adapter at the path, AdapterError if the adapter cannot be served,
        InvalidRequest if the name is invalid or taken, and StorageFailed if the load cannot be recorded.
        """
        self._check_name(ask)
        entry = await self._calls.run(lambda call: self._load(call, ask, sources or self._sources))
        if ask.preload:
            await entry.reaches("resident", PRELOAD_SECONDS)
        return entry

    async def unload(self, name: str, adapter_id: int | None = None) -> Entry:
        """Removes the name at once and returns its entry; the adapter's open requests still finish.

        Raises NotFound for an unknown name, and InvalidRequest if the name's adapter has an id other than `adapter_id`.
        """
        self._check_enabled()
        return await self._calls.run(lambda call: self._unload(call, name, adapter_id))

    async def freed(self, entry: Entry) -> bool:
        """Waits up to FREED_SECONDS for the adapter's memory to be free. Returns whether it is free."""
        return await entry.reaches("gone", FREED_SECONDS)

    async def pin(self, name: str, pinned: bool) -> Entry:
        """Pins or unpins an adapter and returns its entry.

        Raises NotFound for an unknown name, and AdapterError if as many adapters are pinned as may be.
        """
        self._check_enabled()
        return await self._calls.run(lambda call: self._pin(call, name, pinned))

    async def close(self) -> None:
        """Refuses new calls, and ends the open ones with EngineDead."""
        await self._calls.close()

    def record_revision(self, entry: Entry) -> None:
        """Records the revision with which a start-up adapter was loaded, so that a successor serves no other files.

        If that fails, it is tried again with the adapter's next state.
        """
        is_known = entry.source.revision or not entry.is_loaded
        if is_known or not entry.state.revision or self._registry.find(entry.name) is not entry:
            return
        source = _loaded(entry)
        try:
            self._journal.bind(source)
        except StorageFailed as error:
            log.warning("adapter %s: %s", entry.name, error.message)
        else:
            entry.source = source

    # ----------------------------------------------------------------------------------------------------- private

    async def _load(self, call: Call, ask: LoadRequest, sources: Sources) -> Entry:
        async with self.names.held(ask.name):
            now = self._registry.find(ask.name)
            if now is not None and ask.if_missing:
                return now
            is_sound = now is not None and now.state.state != "failed"
            if is_sound and not ask.load_inplace:
                raise _already_loaded(ask.name)
            keeps_pin = now is not None and now.source.pinned
            with self._registry.loading(ask.name), self._counted():
                entry = await self._bring(call, ask, ask.pinned or keeps_pin, sources)
            old = self._registry.point(entry)
            if old is not None:
                self._send(UnloadAdapter(old.source.adapter_id))
            log.info("adapter %s is loaded from %s", ask.name, entry.source.root)
            return entry

    async def _bring(self, call: Call, ask: LoadRequest, pinned: bool, sources: Sources) -> Entry:
        """Loads the adapter to the host, records it, and returns its new entry. `ask.name` does not refer to it yet.

        If the load fails, raises the reason and has the scheduler unload the adapter.
        """
        if pinned:
            self._check_pin(ask.name)
        root = await sources.find(ask.name, ask.path)
        roots, library = sources.allowed, self._library
        text_tools = await sources.read(lambda: library.load(ask.name, root, roots) if library else None)
        if pinned:
            self._check_pin(ask.name)  # other adapters may have been pinned meanwhile
        entry = self._registry.add(
            ask.name, ask.path, root, pinned=pinned, preload=ask.preload, text_tools=text_tools, roots=roots
        )
        try:
            async with self._slots:
                call.has_begun = True
                adapter_id = entry.source.adapter_id
                self._send(
                    LoadAdapter(
                        adapter_id=adapter_id,
                        path=root,
                        pinned=pinned,
                        preload=ask.preload,
                        name=ask.name,
                        roots=entry.source.roots,
                    )
                )
                state = await entry.settled()
            if not entry.is_loaded:
                reason = state.error or "it could not be loaded"
                text = reason if reason.startswith("adapter ") else f"adapter `{ask.name}`: {reason}"
                raise (
                    StorageFailed(text)
                    if state.server_fault
                    else AdapterError(text, param="lora_path", code="adapter_refused")
                )
            entry.source = _loaded(entry)
            self._journal.bind(entry.source)
        except BaseException:
            entry.release()
            self._send(UnloadAdapter(entry.source.adapter_id))
            raise
        return entry

    async def _unload(self, call: Call, name: str, adapter_id: int | None) -> Entry:
        async with self.names.held(name):
            entry = self._known(name)
            if adapter_id is not None and adapter_id != entry.source.adapter_id:
                raise InvalidRequest(
                    f"the adapter `{name}` has lora_int_id {entry.source.adapter_id}, not {adapter_id}",
                    param="lora_int_id",
                )
            call.has_begun = True
            self._journal.unbind(name)
            self._registry.take_name(name)
            self._send(UnloadAdapter(entry.source.adapter_id))
            return entry

    async def _pin(self, call: Call, name: str, pinned: bool) -> Entry:
        async with self.names.held(name):
            entry = self._known(name)
            if pinned:
                self._check_pin(name)
            call.has_begun = True
            source = replace(entry.source, pinned=pinned)
            self._journal.bind(source)
            entry.source = source
            self._send(PinAdapter(entry.source.adapter_id, pinned))
            return entry

    def _known(self, name: str) -> Entry:
        entry = self._registry.find(name)
        if entry is None:  # the wording is one that clients of SGLang and of vLLM recognise
            raise NotFound(
                f"The lora adapter '{name}' cannot be found: it does not exist.",
                param="lora_name",
                code="adapter_not_found",
            )
        return entry

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        try:
            yield
        except EngineError:
            self._metrics.load_failed()
            raise

    def _check_enabled(self) -> None:
        if not self._config.enable_lora:
            raise InvalidRequest("LoRA is not enabled: start with --enable-lora", code="lora_not_enabled")

    def _check_name(self, ask: LoadRequest) -> None:
        self._check_enabled()
        name = ask.name
        if not name or not ask.path:
            raise InvalidRequest(
                "Both 'lora_name' and 'lora_path' must be provided.", param="lora_path" if name else "lora_name"
            )
        if name in self._registry.base_names:
            raise InvalidRequest(
                f"The lora adapter '{name}' conflicts with a served base model.", param="lora_name", code="name_taken"
            )
        if (meant := adapter_of(name, self._registry.base_names)) != name:
            raise InvalidRequest(
                f"The lora adapter '{name}' conflicts with a served base model: the name means the adapter '{meant}' "
                "of it. Choose a name that does not begin with a base model's name and a colon",
                param="lora_name",
                code="name_taken",
            )
        if len(name) > LONGEST_NAME or not name.isprintable() or name != name.strip():
            raise InvalidRequest(
                f"an adapter's name has at most {LONGEST_NAME} characters, printable, without spaces at its ends",
                param="lora_name",
            )

    def _check_pin(self, name: str) -> None:
        most = self._config.max_pinned
        pinned = self._registry.pinned() - {name}
        if len(pinned) >= most:
            raise AdapterError(
                f"the adapter '{name}' cannot be pinned: {len(pinned)} are, and --max-loras-per-batch "
                f"{self._config.max_loras} allows {most}, so that the others are not left to starvation; unpin or "
                "unload one, raise the flag, or load it unpinned",
                param="pinned",
                code="too_many_pinned",
            )


def _loaded(entry: Entry) -> AdapterSource:
    """Returns the entry's source with the revisions that were loaded."""
    text_revision = "" if entry.text_tools is None else entry.text_tools.revision
    return replace(entry.source, revision=entry.state.revision, text_revision=text_revision)


def _already_loaded(name: str) -> InvalidRequest:
    """Returns the error for a name that is taken, in vLLM's wording, because vLLM's clients match the text."""
    return InvalidRequest(
        f"The lora adapter '{name}' has already been loaded. If you want to load the adapter in place, set "
        "'load_inplace' to True.",
        param="lora_name",
        code=ALREADY_LOADED,
    )
