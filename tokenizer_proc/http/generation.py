"""Runs a generating call of any dialect: opens its submits, streams or collects the output, releases everything.

Each dialect implements a `Writer`.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Iterator, Mapping, Sequence
from functools import partial

import msgspec
from aiohttp import web
from msgspec.structs import replace

from engine.errors import InvalidRequest
from engine.messages import Delta, Submit
from tokenizer_proc.http import sse
from tokenizer_proc.http.auth.grants import Grant
from tokenizer_proc.http.auth.rights import tenant_of
from tokenizer_proc.http.batch import Batch, Choice
from tokenizer_proc.http.encoding import encoded, in_slices, json_response
from tokenizer_proc.http.intake.body_reader import ACCOUNT, ANSWER
from tokenizer_proc.http.middleware.access_log import ACCESS_RECORD
from tokenizer_proc.http.service import Service, deadline_of
from tokenizer_proc.requests.validation import check_copies
from tokenizer_proc.work.queue import Job, WorkQueue


class Writer(ABC):
    """Writes the output of a batch in one dialect."""

    @abstractmethod
    def events(self, batch: Batch, choice: Choice, delta: Delta) -> list[object]:
        """Returns the stream's events for one delta, possibly none."""

    @abstractmethod
    def last_events(self, batch: Batch) -> list[object]:
        """Returns the stream's events after the last delta."""

    @abstractmethod
    def whole(self, batch: Batch) -> object:
        """Returns the body of a response that is not streamed. Called when every choice has finished."""

    def check(self, batch: Batch) -> None:  # noqa: B027 - most dialects have nothing to check
        """Raises InvalidRequest for wrong fields that can only be checked once the prompts are encoded."""


class GenerationCall(msgspec.Struct, frozen=True, kw_only=True):
    """A decoded body: the submits that run together, and the ids by which they can be aborted.

    `ids` maps each id to the places of its submits in `submits`. `names` maps fields as the front end's errors name
    them to the client's own names, where the two differ.
    """

    submits: list[Submit]
    ids: Mapping[str, Collection[int]]
    stream: bool
    names: dict[str, str] = {}


async def answer(service: Service, request: web.Request, call: GenerationCall, writer: Writer) -> web.StreamResponse:
    """Runs `call` and returns its response. Everything is released even after an error or a client's disconnect."""
    tenant, python = tenant_of(request), service.frontend.pools.python
    submits = [replace(submit, tenant=tenant.name) for submit in call.submits]
    try:
        check_copies(submit.params for submit in call.submits)
        with tenant.granted(submits) as grant:
            hold = partial(request[ACCOUNT].add, ANSWER)
            batch = Batch(service.frontend, submits, deadline_of(service, request), hold, grant.reserve)
            with _counted(batch, grant):
                async with batch, _recorded(request, batch):
                    writer.check(batch)
                    with service.open.listed(tenant.owner, call.ids, batch):
                        if call.stream:
                            return await sse.respond(request, _events(python, tenant.name, batch, writer))
                        await batch.finish()
                        whole = partial(writer.whole, batch)
                        return json_response(await encoded(python, tenant.name, whole, batch.is_large))
    except InvalidRequest as error:
        error.param = call.names.get(error.param or "", error.param)
        raise


@contextlib.contextmanager
def _counted(batch: Batch, grant: Grant) -> Iterator[None]:
    """On leaving, sets the tokens that the call used, even after an error."""
    try:
        yield
    finally:
        usage = batch.usage()
        grant.used = usage.prompt_tokens + usage.completion_tokens


@contextlib.asynccontextmanager
async def _recorded(request: web.Request, batch: Batch) -> AsyncIterator[None]:
    """On leaving, adds facts to the access log, even after an error."""
    try:
        yield
    finally:
        usage = batch.usage()
        request[ACCESS_RECORD].facts |= {
            "lora": _names(batch),
            "prompt": usage.prompt_tokens,
            "cached": usage.cached_tokens,
            "tokens": usage.completion_tokens,
            "finish": ",".join(sorted({choice.finish_reason or "none" for choice in batch.choices})),
        }


def _names(batch: Batch) -> str | None:
    """Returns the names of a call's adapters, joined by commas for the access log, or None without adapters."""
    loras = [submit.lora for submit in batch.submits]
    names = {name for lora in loras if lora is not None for name in ([lora] if isinstance(lora, str) else lora)}
    return ",".join(sorted(names)) or None


async def _events(
    queue: WorkQueue, tenant: str, batch: Batch, writer: Writer
) -> AsyncGenerator[Sequence[object], None]:
    async with contextlib.aclosing(batch.deltas()) as deltas:
        async for choice, delta in deltas:
            if batch.is_large:
                events = await queue.run(tenant, partial(_large_events, batch, writer, choice, delta))
            else:
                events = writer.events(batch, choice, delta)
            if events:
                batch.mark_written()
            yield events
    yield writer.last_events(batch)


def _large_events(batch: Batch, writer: Writer, choice: Choice, delta: Delta, job: Job) -> list[object]:
    """Returns the events for one delta, already encoded, in slices."""
    return [msgspec.Raw(in_slices(event, job.check)) for event in writer.events(batch, choice, delta)]
