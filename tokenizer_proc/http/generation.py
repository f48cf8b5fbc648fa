"""What every route works with, and the one way a generating call runs: open, stream or collect, release.

Knows no dialect: a `Writer` is one.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Iterable, Iterator, Mapping, Sequence

import msgspec
from aiohttp import web
from msgspec.structs import replace

from engine.config.sections import TokenizerConfig
from engine.errors import InvalidRequest
from engine.messages import Delta, Submit
from tokenizer_proc.frontend import Frontend
from tokenizer_proc.http import sse
from tokenizer_proc.http.batch import Batch, Choice
from tokenizer_proc.http.encoding import encoded, in_slices
from tokenizer_proc.http.middleware.access_log import ACCESS_RECORD
from tokenizer_proc.requests.deadline import Deadline
from tokenizer_proc.requests.tenants import Tenant

TENANT = web.RequestKey("tenant", Tenant)
"""Where a request that was let in carries its holder."""


def holder(request: web.Request) -> Tenant:
    """Whose call this is."""
    return request[TENANT]


def deadline(service: Service, request: web.Request) -> Deadline:
    """When this call must be done."""
    return service.frontend.deadline(request[ACCESS_RECORD].arrived)


class OpenCalls:
    """What is running, by the ids its clients know: what /abort_request looks in. An id means some items of a batch."""

    def __init__(self) -> None:
        self._running: dict[str, list[tuple[Batch, Collection[int]]]] = {}

    @contextlib.contextmanager
    def listed(self, ids: Mapping[str, Collection[int]], batch: Batch) -> Iterator[None]:
        """The items of `batch` can be aborted by their `ids` while this is entered."""
        for name, items in ids.items():
            self._running.setdefault(name, []).append((batch, items))
        try:
            yield
        finally:
            for name, items in ids.items():
                self._running[name].remove((batch, items))
                if not self._running[name]:
                    del self._running[name]

    def names(self) -> dict[int, list[str]]:
        """The clients' ids of every open request, by the scheduler's."""
        found: dict[int, list[str]] = {}
        for name, calls in self._running.items():
            for request_id in (each for batch, items in calls for each in batch.request_ids(items)):
                found.setdefault(request_id, []).append(name)
        return found

    def abort(self, names: Iterable[str] | None) -> int:
        """Cancels what is called by one of `names`, or all. Returns how many calls that concerns."""
        found = [self._running.get(name, []) for name in (self._running if names is None else names)]
        for batch, items in (each for group in found for each in group):
            batch.cancel(items)
        return len({id(batch) for group in found for batch, _ in group})


class Service:
    """The front end, the config, the open calls, and since when it serves."""

    def __init__(self, frontend: Frontend, config: TokenizerConfig) -> None:
        self.frontend = frontend
        self.config = config
        self.open = OpenCalls()
        self.started = int(time.time())


class Writer(ABC):
    """How a dialect says what a batch brings."""

    @abstractmethod
    def events(self, batch: Batch, choice: Choice, delta: Delta) -> list[object]:
        """The events for one delta, possibly none."""

    @abstractmethod
    def last_events(self, batch: Batch) -> list[object]:
        """What follows the last delta."""

    @abstractmethod
    def whole(self, batch: Batch) -> object:
        """The answer when every choice has finished."""

    def check(self, batch: Batch) -> None:  # noqa: B027 - most dialects have nothing to check
        """Raises InvalidRequest for what can only be judged once the prompts are known."""


class GenerationCall(msgspec.Struct, frozen=True, kw_only=True):
    """A body, understood: what to run together, and which of it can be aborted by which of `ids`.

    `names` are the client's words for what the front end complains of, where they differ.
    """

    submits: list[Submit]
    ids: Mapping[str, Collection[int]]
    stream: bool
    names: dict[str, str] = {}


async def answer(service: Service, request: web.Request, call: GenerationCall, writer: Writer) -> web.StreamResponse:
    """Runs `call`. Whatever ends this (the client included) leaves nothing behind."""
    tenant = holder(request)
    try:
        tenant.admit([submit.lora for submit in call.submits])
        submits = [replace(submit, tenant=tenant.name) for submit in call.submits]
        async with Batch(service.frontend, submits, deadline(service, request)) as batch, _charged(request, batch):
            writer.check(batch)
            with service.open.listed(call.ids, batch):
                if call.stream:
                    return await sse.respond(request, _events(batch, writer))
                await batch.finish()
                return _json(await encoded(lambda: writer.whole(batch), batch.is_large))
    except InvalidRequest as error:
        error.param = call.names.get(error.param or "", error.param)
        raise


@contextlib.asynccontextmanager
async def _charged(request: web.Request, batch: Batch) -> AsyncIterator[None]:
    """The caller pays for what was made, however that ended, and the log will tell of it."""
    tenant = holder(request)
    try:
        yield
    finally:
        usage = batch.usage()
        tenant.charge(usage.prompt_tokens + usage.completion_tokens)
        request[ACCESS_RECORD].facts |= {
            "lora": _names(batch),
            "prompt": usage.prompt_tokens,
            "cached": usage.cached_tokens,
            "tokens": usage.completion_tokens,
            "finish": ",".join(sorted({choice.finish_reason or "none" for choice in batch.choices})),
        }


def _names(batch: Batch) -> str | None:
    """The adapters that a call went through."""
    loras = [submit.lora for submit in batch.submits]
    names = {name for lora in loras if lora is not None for name in ([lora] if isinstance(lora, str) else lora)}
    return ",".join(sorted(names)) or None


def as_json(value: object) -> web.Response:
    """A 200 with `value` as JSON."""
    return _json(msgspec.json.encode(value))


def _json(body: bytes) -> web.Response:
    return web.Response(body=body, content_type="application/json")


async def _events(batch: Batch, writer: Writer) -> AsyncGenerator[Sequence[object], None]:
    async with contextlib.aclosing(batch.deltas()) as deltas:
        async for choice, delta in deltas:
            if batch.is_large:
                yield await asyncio.to_thread(_large_events, batch, writer, choice, delta)
            else:
                yield writer.events(batch, choice, delta)
    yield writer.last_events(batch)


def _large_events(batch: Batch, writer: Writer, choice: Choice, delta: Delta) -> list[object]:
    """The events of a delta, encoded already."""
    return [msgspec.Raw(in_slices(event)) for event in writer.events(batch, choice, delta)]
