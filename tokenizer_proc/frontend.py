"""The front end, which both servers (HTTP and ZeroMQ) use: submits in, streams of deltas out.

Messages from the scheduler are passed to `Frontend.handle`. Does not depend on HTTP or sockets.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable
from typing import Any

import msgspec

from engine.config.process_configs import TokenizerConfig
from engine.errors import EngineDead, InvalidRequest, Overloaded
from engine.journal.journal import Journal
from engine.journal.memory_file import MemoryFile
from engine.journal.work_notes import WorkNotes
from engine.messages import (
    AdapterMix,
    AdapterState,
    Capacity,
    Hello,
    Progress,
    Stats,
    Submit,
    ToTokenizer,
    UnloadAdapter,
    WaitReason,
)
from tokenizer_proc.adapters.entry import Entry
from tokenizer_proc.adapters.lifecycle import Lifecycle
from tokenizer_proc.adapters.registry import AdapterRegistry
from tokenizer_proc.adapters.resolver import Resolver
from tokenizer_proc.adapters.tokenizers import TextTools, TokenizerLibrary
from tokenizer_proc.requests.deadline import Deadline
from tokenizer_proc.requests.preparation import PreparedRequest, RequestPreparer, max_request_length
from tokenizer_proc.requests.stream import Reserve, Stream
from tokenizer_proc.requests.text_work import TextWork
from tokenizer_proc.server_info import ServerInfo
from tokenizer_proc.telemetry.gauges import MetricsSnapshot
from tokenizer_proc.telemetry.metrics import Metrics
from tokenizer_proc.text.generation_config import GenerationConfig
from tokenizer_proc.text.templates.chat_template import ChatTemplate
from tokenizer_proc.text.tokenizer import Tokenizer
from tokenizer_proc.upstream.router import Router
from tokenizer_proc.work.pools import WorkPools

__all__ = ["Frontend", "Stream"]

log = logging.getLogger(__name__)

STUCK_SECONDS = 30.0
ADAPTER_WAITS: tuple[WaitReason, ...] = ("load", "fill")


class Frontend:
    """The engine's interface for its HTTP and ZeroMQ servers. `send` queues a message for the scheduler."""

    def __init__(
        self,
        config: TokenizerConfig,
        send: Callable[[msgspec.Struct], None],
        tokenizer: Tokenizer,
        chat: ChatTemplate,
        generation_config: GenerationConfig,
    ) -> None:
        self.tokenizer = tokenizer
        base = TextTools(tokenizer, chat, generation_config)
        notes = WorkNotes(None if config.work_notes is None else MemoryFile(config.work_notes), config.after_fault)
        self.tokenizer_library = TokenizerLibrary(base, config.tokenizer_path, config.chat_template is not None, notes)
        epoch, failed = config.endpoints.epoch, dict[int, str]()
        text_tools = self.tokenizer_library.load_all(config.adapters, failed if epoch else None)
        self.adapters = AdapterRegistry(config.served_model_names, config.adapters, epoch, text_tools)
        for adapter_id, reason in failed.items():
            self.adapters.refuse(adapter_id, reason)
        self.metrics = Metrics(config.served_model_names[0], self._snapshot)
        journal = Journal([MemoryFile(descriptor) for descriptor in config.journal])
        self.lifecycle = Lifecycle(config, self.adapters, send, self.metrics, self.tokenizer_library, journal)
        self.resolver: Resolver | None = None
        if config.lora_resolve_root is not None:
            self.resolver = Resolver(config.lora_resolve_root, self.adapters, self.lifecycle, config.lora_roots)
        self.capacity: Capacity | None = None
        self.stats = Stats()
        self.router = Router(send, config.endpoints.epoch, config.max_open_requests, config.max_queued_tokens)
        self.epoch = config.endpoints.epoch
        self.is_draining = False
        self.pools = WorkPools()
        self.texts = TextWork(self.pools, notes, lambda: self.max_length)
        self._preparer = RequestPreparer(config, self.adapters, base, self.resolver, self.texts)
        self._info = ServerInfo(config, self.adapters, self.router)
        self._config = config
        self._send = send
        self._moved = time.monotonic()
        # a former process may have flushed the prefixes, which this one does not know
        self._prefixes = f"restart {self.epoch}" if self.epoch else ""

    @classmethod
    def load(cls, config: TokenizerConfig, send: Callable[[msgspec.Struct], None]) -> Frontend:
        """Returns a front end with the tokenizer, chat template and generation config in the config's directories.

        Raises ConfigError if these cannot be read.
        """
        tokenizer = Tokenizer.load(config.tokenizer_path)
        chat = ChatTemplate.load(config.tokenizer_path, config.chat_template, tokenizer.special_tokens)
        return cls(config, send, tokenizer, chat, GenerationConfig.load(config.model_path, tokenizer.eos_id))

    # ----------------------------------------------------------------------------------------- for the servers

    def open(self, submit: Submit, deadline: Deadline | None = None, reserve: Reserve | None = None) -> Stream:
        """Returns a stream for `submit`. Entering it validates the submit, and raises an EngineError to refuse it.

        `deadline` is the deadline of the call that the submit belongs to; by default it counts from now. `reserve`, if
        given, is called once the prompt is encoded, before anything is generated, and may raise an EngineError.
        """
        if self._prefixes:
            submit = msgspec.structs.replace(submit, cache_salt=f"{self._prefixes} {submit.cache_salt}")
        return Stream(submit, self.prepare, self.router, self.metrics, deadline or self.deadline(), reserve)

    def flush_prefixes(self) -> None:
        """Makes no later request find the prefix pages of earlier ones, by a salt of its own for all later ones.

        Open requests keep their pages. Pages that nothing finds any more are reused when pages are needed.
        """
        self._prefixes = uuid.uuid4().hex

    def deadline(self, arrived: float | None = None) -> Deadline:
        """Returns the deadline of a call that arrived at `arrived` (monotonic seconds; by default now)."""
        return Deadline(self._config.request_timeout, arrived)

    def check_size(self, choices: int) -> None:
        """Raises InvalidRequest if a call has more choices than may be open at once (--max-open-requests)."""
        if choices > self._config.max_open_requests:
            raise InvalidRequest(
                f"one call asks for {choices} answers; at most {self._config.max_open_requests} can be open: split it",
                param="prompt",
            )

    async def fetch(
        self,
        model: str | None,
        *loras: str | AdapterMix | None,
        may_use: Callable[[str], bool] = lambda name: True,
    ) -> None:
        """Loads the adapters that `model` and `loras` name, if they are unknown and lie under --lora-resolve-root.

        Only adapters for which `may_use` returns True are looked for. Raises the EngineError of a load that failed.
        """
        if self.resolver is not None:
            await self.resolver.fetch_named(model, *loras, may_use=may_use)

    def text_tools_for(self, lora: str | AdapterMix | None) -> TextTools:
        """Returns the tokenizer, chat template and generation config that requests with the adapters `lora` use."""
        return self._preparer.text_tools_of(self.adapters.resolve(lora))

    @property
    def is_ready(self) -> bool:
        """Whether requests can be served: capacity is known, start-up adapters are loaded, no shutdown has begun."""
        return self.capacity is not None and self.adapters.is_ready and not self.is_draining

    @property
    def is_stuck(self) -> bool:
        """Whether open requests have made no progress for STUCK_SECONDS.

        In that case the scheduler is silent, or a step does not end.
        """
        return self.router.open > 0 and time.monotonic() - max(self._moved, self.router.began) > STUCK_SECONDS

    @property
    def max_length(self) -> int:
        """The largest number of tokens of a request, prompt and output together; 0 before capacity is known."""
        return 0 if self.capacity is None else max_request_length(self.capacity)

    def info(self) -> dict[str, Any]:
        """Returns the content of /server_info as plain JSON types."""
        return self._info.collect(self.capacity, self.stats, self.max_length)

    def vllm_info(self) -> dict[str, Any]:
        """Returns the configuration in the shape of vLLM's /server_info."""
        return self._info.as_vllm(self.capacity, self.max_length)

    def current_load(self) -> dict[str, Any]:
        """Returns the load in the shape of SGLang's /v1/loads, for its one rank."""
        return self._info.load(self.capacity, self.stats)

    @property
    def open_requests(self) -> int:
        """The number of open requests; each choice of a call counts."""
        return self.router.open

    # ---------------------------------------------------------------------------------------- for the scheduler

    def handle(self, message: ToTokenizer) -> None:
        """Handles one message from the scheduler."""
        if not isinstance(message, Stats) or _shows_progress(self.stats, message):
            self._moved = time.monotonic()
        match message:
            case Progress():
                self.router.handle(message)
            case Stats():
                self.stats = message
                self.router.update_stats(message)
                self.metrics.steps(message.step_seconds)
            case AdapterState():
                self._handle_adapter(message)
            case Capacity():
                self.capacity = self.router.wait_reasons.capacity = message
                self.adapters.load(self._send)
                self.adapters.unload(self._send)
            case Hello():
                pass

    def recover(self, scheduler: int) -> None:
        """Sends a new scheduler all adapters, then every open request, then the unloads of the draining adapters.

        In this order an open request still finds its adapter even if the adapter is draining. `scheduler` is the new
        scheduler's epoch.
        """
        self.adapters.load(self._send)
        self.router.resubmit(scheduler)
        self.adapters.unload(self._send)

    async def drain(self, seconds: float) -> None:
        """Refuses new requests, waits up to `seconds` for open streams to finish, and ends the rest with EngineDead."""
        self.is_draining = True
        await self.lifecycle.close()
        if not await self.router.wait_idle(seconds):
            log.info("%d answers did not finish in time and are aborted", self.router.open)
            self.router.fail_all(EngineDead("the server is shutting down"))
            await self.router.wait_idle(1.0)  # gives the streams' readers time to take the error
        self.tokenizer_library.close()
        self.pools.close()

    def _handle_adapter(self, state: AdapterState) -> None:
        entry = self.adapters.entry(state.adapter_id)
        before = None if entry is None else entry.state
        if entry is None and state.state != "gone":  # a former tokenizer process began this load
            self._send(UnloadAdapter(state.adapter_id))
            return
        self.adapters.handle(state)
        if entry is not None and before is not None:
            self.lifecycle.record_revision(entry)
            self._measure(entry, before, state)
            if state.state == "gone" and self.adapters.card(entry.name) is None:
                self.metrics.forget_adapter(entry.name)

    def _measure(self, entry: Entry, before: AdapterState, now: AdapterState) -> None:
        match before.state, now.state:
            case (("loading" | "disk"), "host") if now.seconds:
                self.metrics.adapter_seconds("load", now.seconds)
            case (("loading" | "disk" | "host"), "resident") if now.seconds:
                self.metrics.adapter_seconds("fill", now.seconds)
            case stage, "gone" if entry.draining and stage != "failed":
                self.metrics.adapter_seconds("unload", time.monotonic() - entry.released)
            case stage, "failed" if before.revision and stage != "failed":
                self.metrics.load_failed()  # a reload by the scheduler; Lifecycle counts first loads

    async def prepare(self, submit: Submit) -> PreparedRequest:
        """Prepares `submit` for its stream.

        Raises Overloaded while the model is loading or the server is shutting down, and the errors of
        `RequestPreparer.prepare`.
        """
        if self.is_draining:
            raise Overloaded("the server is shutting down")
        if self.capacity is None:
            raise Overloaded("the model is still loading")
        return await self._preparer.prepare(submit, self.capacity)

    def _snapshot(self) -> MetricsSnapshot:
        config, stats = self._config, self.stats
        return MetricsSnapshot(
            stats=stats,
            capacity=self.capacity,
            max_loras=config.max_loras if config.enable_lora else None,
            running=self.adapters.by_name(stats.running_adapters),
            waiting=self.adapters.by_name(stats.waiting_adapters),
            wanted=self.resolver.loading if self.resolver is not None else [],
            tiers=self.adapters.stages(),
            footprints=self.adapters.footprints(),
        )


def _shows_progress(before: Stats, now: Stats) -> bool:
    """Returns whether steps were done between two Stats, or no step was due.

    No step is due while no request runs and either none waits or one waits for its adapter, for as long as the load
    takes.
    """
    is_loading = any(now.waiting_reasons.get(reason) for reason in ADAPTER_WAITS)
    return now.steps != before.steps or (not now.running and (is_loading or not now.waiting))
