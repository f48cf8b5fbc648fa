"""The front end both doors stand on: submits in, streams of deltas out; messages of the scheduler in between.

Knows names, text and the gate; knows nothing of HTTP, sockets or pages.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from typing import Any

import msgspec

from engine.config.sections import TokenizerConfig
from engine.errors import AdapterError, EngineDead, InvalidRequest, Overloaded
from engine.messages import (
    AdapterMix,
    AdapterState,
    Capacity,
    ChatMessage,
    Hello,
    Ping,
    Progress,
    Stats,
    Submit,
    ToTokenizer,
    UnloadAdapter,
    WaitReason,
)
from tokenizer_proc.adapters.lifecycle import Lifecycle
from tokenizer_proc.adapters.registry import AdapterRegistry
from tokenizer_proc.adapters.resolver import Resolver
from tokenizer_proc.adapters.selection import AdapterSelection, Entry
from tokenizer_proc.adapters.tokenizers import TextTools, TokenizerLibrary
from tokenizer_proc.requests.deadline import Deadline
from tokenizer_proc.requests.stream import PreparedRequest, Stream
from tokenizer_proc.requests.validation import SEEDS, check_priority, validate_params
from tokenizer_proc.telemetry.metrics import Metrics, MetricsSnapshot
from tokenizer_proc.text.generation_config import GenerationConfig
from tokenizer_proc.text.templates.chat_template import ChatRenderer, ChatTemplate
from tokenizer_proc.text.tokenizer import Tokenizer
from tokenizer_proc.upstream.router import Router

__all__ = ["Frontend", "Stream"]

log = logging.getLogger(__name__)

STUCK_SECONDS = 30.0
ADAPTER_WAITS: tuple[WaitReason, ...] = ("load", "fill")
ATTEMPTS = 5


class Frontend:
    """One engine as the doors see it. `send` puts a message into the scheduler's inbox."""

    def __init__(
        self,
        config: TokenizerConfig,
        send: Callable[[msgspec.Struct], None],
        tokenizer: Tokenizer,
        chat: ChatTemplate,
        generation_config: GenerationConfig,
    ) -> None:
        self.tokenizer = tokenizer
        self.chat = chat
        self.tokenizer_library = TokenizerLibrary(
            TextTools(tokenizer, chat, generation_config), config.tokenizer_path, config.chat_template is not None
        )
        config, own = _with_text_tools(config, self.tokenizer_library)
        self.adapters = AdapterRegistry(config.served_model_names, config.adapters, config.links.epoch, own)
        self.metrics = Metrics(config.served_model_names[0], self._snapshot)
        self.lifecycle = Lifecycle(config, self.adapters, send, self.metrics, self.tokenizer_library)
        self._resolver: Resolver | None = None
        if config.lora_resolve_root is not None:
            self._resolver = Resolver(config.lora_resolve_root, self.adapters, self.lifecycle, config.lora_roots)
        self.capacity: Capacity | None = None
        self.stats = Stats()
        self.router = Router(send, config.links.epoch, config.max_open_requests, config.max_queued_tokens)
        self.epoch = config.links.epoch
        self.is_draining = False
        self._config = config
        self._send = send
        self._seeds = random.Random(config.seed)
        self._started = time.time()
        self._moved = time.monotonic()

    @classmethod
    def load(cls, config: TokenizerConfig, send: Callable[[msgspec.Struct], None]) -> Frontend:
        """With the tokenizer, template and defaults of the config's directories. Raises ConfigError."""
        tokenizer = Tokenizer.load(config.tokenizer_path)
        chat = ChatTemplate.load(config.tokenizer_path, config.chat_template, tokenizer.special_tokens)
        return cls(config, send, tokenizer, chat, GenerationConfig.load(config.model_path, tokenizer.eos_id))

    # ------------------------------------------------------------------------------------------- for the doors

    def open(self, submit: Submit, deadline: Deadline | None = None) -> Stream:
        """A stream for `submit`; entering it checks everything and raises the EngineError that fits.

        Without a `deadline` of a larger call the submit arrives now.
        """
        return Stream(submit, self._prepare, self.router, self.metrics, deadline or self.deadline())

    def deadline(self, arrived: float | None = None) -> Deadline:
        """When a call that arrived then (monotonic seconds; by default now) must be done."""
        return Deadline(self._config.request_timeout, arrived)

    def check_size(self, choices: int) -> None:
        """Raises InvalidRequest for a call that could never be open at once: to try again would not help."""
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
        """Loads what is named, is unknown and lies under --lora-resolve-root. Raises why that failed.

        Of the adapters that `model` could mean, those that the caller may use are looked for.
        """
        if self._resolver is None:
            return
        for name in filter(may_use, self.adapters.candidates(model, None)):
            await self._resolver.fetch(name)
        for lora in loras:
            for name in self.adapters.candidates(None, lora):
                if not await self._resolver.fetch(name):
                    return  # it will be refused by name: the rest need not be looked for

    def text_tools_for(self, lora: str | AdapterMix | None) -> tuple[Tokenizer, ChatRenderer]:
        """The tokenizer and chat template that go with a selection."""
        text_tools = self._text_tools(self.adapters.resolve(lora))
        return text_tools.tokenizer, text_tools.chat

    @property
    def is_ready(self) -> bool:
        """It takes requests: capacity is known, every start-up adapter is loaded, and it is not shutting down."""
        return self.capacity is not None and self.adapters.is_ready and not self.is_draining

    @property
    def is_stuck(self) -> bool:
        """Requests are open, and for long nothing moved: the scheduler is silent, or a step hangs, or is endless."""
        return self.router.open > 0 and time.monotonic() - max(self._moved, self.router.began) > STUCK_SECONDS

    @property
    def max_length(self) -> int:
        """Tokens one request may have, prompt and answer; 0 before capacity is known."""
        capacity = self.capacity
        return min(capacity.max_length, capacity.kv_pages * capacity.page_size) if capacity is not None else 0

    def info(self) -> dict[str, Any]:
        """Facts for /server_info, of plain JSON types."""
        return {
            **self._config.server_info,
            "model_path": self._config.model_path,
            "tokenizer_path": self._config.tokenizer_path,
            "served_model_names": self.adapters.base_names,
            "adapters": [card.name for card in self.adapters.cards()],
            "enable_lora": self._config.enable_lora,
            "max_length": self.max_length,
            "uptime_seconds": time.time() - self._started,
            "open_requests": self.router.open,
            "lora_pool": self._pool(),
            "capacity": _plain(self.capacity),
            "stats": _plain(msgspec.structs.replace(self.stats, step_seconds=[])),  # those are for /metrics
            "long_waiting": self._long_waiting(),
        }

    # ---------------------------------------------------------------------------------------- for the scheduler

    def handle(self, message: ToTokenizer) -> None:
        """Takes in one message of the scheduler."""
        if not isinstance(message, Stats) or _shows_motion(self.stats, message):
            self._moved = time.monotonic()
        match message:
            case Progress():
                self.router.handle(message)
            case Stats():
                self.stats = message
                self.router.look(message)
                self.metrics.steps(message.step_seconds)
            case AdapterState():
                self._adapter_news(message)
            case Capacity():
                self.capacity = self.router.wait_reasons.capacity = message
                self.adapters.load(self._send)
                self.adapters.unload(self._send)
            case Hello() | Ping():
                pass

    def recover(self, scheduler: int) -> None:
        """Another scheduler listens: it is told of the adapters, of every open request, and of what drains.

        In this order, so that a request finds its adapter, also one that nobody else may name any more.
        """
        self.adapters.load(self._send)
        self.router.resubmit(scheduler)
        self.adapters.unload(self._send)

    async def drain(self, seconds: float) -> None:
        """Takes nothing new, lets open streams finish for so long, then ends them with EngineDead."""
        self.is_draining = True
        await self.lifecycle.close()
        if not await self.router.idle(seconds):
            log.info("%d answers did not finish in time and are aborted", self.router.open)
            self.router.fail(EngineDead("the server is shutting down"))
            await self.router.idle(1.0)  # their readers are told
        self.tokenizer_library.close()

    def _adapter_news(self, state: AdapterState) -> None:
        entry = self.adapters.entry(state.adapter_id)
        before = None if entry is None else entry.state
        if entry is None and state.state != "gone":  # a load that our predecessor began and did not live to see
            self._send(UnloadAdapter(state.adapter_id))
            return
        self.adapters.handle(state)
        if entry is not None and before is not None:
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
                self.metrics.load_failed()  # its files were to be read again; a first load's caller counts it himself

    def _pool(self) -> dict[str, dict[str, int]]:
        """Rank pages by group: how many there are, are used, and the bytes of one."""
        capacity = self.capacity
        if capacity is None:
            return {}
        return {
            group: {
                "pages": pages,
                "used": self.stats.rank_pages_used.get(group, 0),
                "page_bytes": capacity.rank_page_bytes.get(group, 0),
            }
            for group, pages in capacity.rank_pages.items()
        }

    def _long_waiting(self) -> list[dict[str, Any]]:
        """The oldest requests that wait for long, and for what, of plain JSON types."""
        waits = self.router.wait_reasons
        return [
            {
                "request_id": waiting.request_id,
                "adapters": self.adapters.names(lora),
                "seconds": round(waiting.seconds, 3),
                "tokens": waiting.generated,
                "reason": waiting.reason,
                "waits_for": waits.want(waiting.reason),
            }
            for waiting in waits.long()
            if (lora := self.router.lora(waiting.request_id)) is not None
        ]

    # --------------------------------------------------------------------------------------------- for a stream

    async def _prepare(self, submit: Submit) -> PreparedRequest:
        """The gate. Raises InvalidRequest, NotFound, AdapterError, or Overloaded while the model is loading."""
        if self.is_draining:
            raise Overloaded("the server is shutting down")
        if self.capacity is None:
            raise Overloaded("the model is still loading")
        check_priority(submit.priority, self._config.priorities)
        await self.fetch(None, submit.lora)
        selection = self._selection(submit.lora, self.capacity)
        for _ in range(ATTEMPTS):
            text_tools = self._text_tools(selection)
            with selection.held():  # so that it is not idle meanwhile
                prompt_ids = await _prompt_ids(submit, text_tools, self.max_length)
            selection = self._selection(submit.lora, self.capacity)  # what the names mean when it is sent
            if self._text_tools(selection) is text_tools:
                break
        else:
            raise Overloaded("its adapter is being replaced all the time")
        own = selection.speaker if selection.speaker is not None and selection.speaker.vocab_size else None
        if self._resolver is not None:
            self._resolver.touch(selection.names)
        return PreparedRequest(
            prompt_ids,
            validate_params(
                submit.params,
                generation_config=text_tools.generation_config,
                seed=self._seeds.randrange(SEEDS),
                prompt=prompt_ids,
                max_length=self.max_length,
                vocab_size=self.capacity.vocab_size if own is None else own.vocab_size,
                default_max_tokens=submit.default_max_tokens,
                adapter=None if own is None else own.name,
            ),
            selection,
            text_tools.tokenizer,
        )

    def _text_tools(self, selection: AdapterSelection) -> TextTools:
        return selection.text_tools or self.tokenizer_library.base

    def _selection(self, lora: str | AdapterMix | None, capacity: Capacity) -> AdapterSelection:
        selection = self.adapters.resolve(lora)
        if selection.failure is not None:
            raise AdapterError(selection.failure, param="lora_path")
        if selection.stranger is not None:
            raise InvalidRequest(
                f"adapter `{selection.stranger}` has a vocabulary of its own: it can neither be mixed nor scaled",
                param="lora_path",
            )
        if selection.activated is not None:
            raise InvalidRequest(
                f"adapter `{selection.activated}` acts from its invocation on (alora_invocation_tokens): do not mix it",
                param="lora_path",
            )
        for group, pages in selection.pages.items():
            if pages > capacity.max_lane_pages:
                raise InvalidRequest(
                    f"the mix needs {pages} rank pages in {group}; at most {capacity.max_lane_pages} fit one request: "
                    "mix fewer adapters, or raise --max-lora-rank",
                    param="lora_path",
                )
        return selection

    def _snapshot(self) -> MetricsSnapshot:
        config, stats = self._config, self.stats
        return MetricsSnapshot(
            stats=stats,
            capacity=self.capacity,
            max_loras=config.max_loras if config.enable_lora else None,
            running=self.adapters.by_name(stats.running_adapters),
            waiting=self.adapters.by_name(stats.waiting_adapters),
            wanted=self._resolver.loading if self._resolver is not None else [],
            tiers=self.adapters.stages(),
        )


def _shows_motion(before: Stats, now: Stats) -> bool:
    """Whether the work goes on: steps were done between the two, or no step is due, as nothing runs or could.

    A request that waits for an adapter may wait for as long as its load takes.
    """
    is_loading = any(now.waiting_reasons.get(reason) for reason in ADAPTER_WAITS)
    return now.steps != before.steps or (not now.running and (is_loading or not now.waiting))


def _plain(value: object) -> Any:
    """Structs are array-like on the wire; for people their fields have names. Who waits is told apart."""
    if not isinstance(value, msgspec.Struct):
        return value
    return {name: field for name, field in msgspec.structs.asdict(value).items() if name != "oldest_waiting"}


def _with_text_tools(
    config: TokenizerConfig, library: TokenizerLibrary
) -> tuple[TokenizerConfig, dict[int, TextTools]]:
    """How the adapters of the start read and write, by id.

    Raises AdapterError where that makes no sense; whoever takes over from another process only goes on without those.
    """
    found, adapters = {}, []
    for source in config.adapters:
        try:
            found[source.adapter_id] = library.of(source.name, source.root)
            adapters.append(source)
        except AdapterError as error:
            if config.links.epoch == 0:
                library.close()
                raise
            log.error("%s; it is not served any more", error.message)
    return msgspec.structs.replace(config, adapters=adapters), found


async def _prompt_ids(submit: Submit, text_tools: TextTools, max_length: int) -> list[int]:
    """The submit's prompt as token ids: of a text, of ids as they are, or of a chat through the template."""
    prompt, tokenizer = submit.prompt, text_tools.tokenizer
    if isinstance(prompt, str):
        return await _encoded(prompt, tokenizer, submit.add_special_tokens, max_length)
    if len(prompt) > max_length:  # each of them is a token at least
        raise InvalidRequest(
            f"the prompt has {len(prompt)} parts; this model's context is {max_length} tokens",
            param="prompt",
            code="context_length_exceeded",
        )
    messages = [part for part in prompt if isinstance(part, ChatMessage)]
    if not messages:
        return [part for part in prompt if isinstance(part, int)]
    if len(messages) != len(prompt):
        raise InvalidRequest("a prompt is token ids or messages, not both", param="prompt")
    text = await text_tools.chat.prompt(
        messages,
        add_generation_prompt=submit.add_generation_prompt,
        continue_final_message=submit.continue_final_message,
        **_template_arguments(submit),
    )
    return await _encoded(text, tokenizer, False, max_length)


async def _encoded(text: str, tokenizer: Tokenizer, add_special_tokens: bool, max_length: int) -> list[int]:
    """Ids of `text`, unless it is so long that counting its tokens would only cost time."""
    if len(text) > max_length * tokenizer.longest_token:
        raise InvalidRequest(
            f"the prompt has {len(text)} characters; this model's context is {max_length} tokens, "
            f"and no token stands for more than {tokenizer.longest_token} characters",
            param="prompt",
            code="context_length_exceeded",
        )
    return await tokenizer.encode_text(text, add_special_tokens)


def _template_arguments(submit: Submit) -> dict[str, Any]:
    """chat_template_kwargs, which must not name what the call itself says."""
    for name in ("messages", "add_generation_prompt", "continue_final_message", "self"):
        if name in submit.chat_template_kwargs:
            raise InvalidRequest(
                f"`{name}` is a field of its own, not one of chat_template_kwargs", param="chat_template_kwargs"
            )
    return submit.chat_template_kwargs
