"""The parts that the routes for chat and for completions share: common body fields, and the response's envelope.

The fields of vLLM's bodies that OpenAI's lack are served as vLLM does: `return_token_ids`, `prompt_logprobs`, ...
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Collection, Sequence

import msgspec

from engine.errors import InvalidRequest
from engine.messages import AdapterMix, SamplingParams, Usage
from tokenizer_proc.http.batch import Prompt
from tokenizer_proc.http.dialects import logprobs
from tokenizer_proc.http.middleware.access_log import LONGEST_ID
from tokenizer_proc.http.service import Service

LoraField = str | AdapterMix


class StreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """OpenAI's `stream_options`. `include_obfuscation`, which requests padding against eavesdroppers, has no effect.

    With `continuous_usage_stats` (vLLM's) beside `include_usage`, each event has the usage of its choice so far.
    """

    include_usage: bool | None = False
    continuous_usage_stats: bool | None = False
    include_obfuscation: bool | None = False


class OpenAIBody(msgspec.Struct, frozen=True, kw_only=True):
    """The body fields that both routes have, without the sampling parameters.

    `request_id` (vLLM's) or `rid` (SGLang's) is the id of the response, by which the call can be aborted.
    """

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    best_of: int | None = None
    priority: int = 0
    prompt_logprobs: int | None = None
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    truncate_prompt_tokens: int | None = None
    cache_salt: str = ""
    request_id: str | None = None
    rid: str | None = None


def check(body: OpenAIBody, params: SamplingParams) -> None:
    """Raises InvalidRequest for fields that contradict each other."""
    if body.stream_options is not None and any(msgspec.structs.astuple(body.stream_options)) and not body.stream:
        raise InvalidRequest("stream_options needs stream = true", param="stream_options")
    if body.best_of is not None and body.best_of != params.n:
        raise InvalidRequest(f"best_of = {body.best_of} other than n = {params.n} is not supported", param="best_of")
    if body.prompt_logprobs and body.stream:
        raise InvalidRequest("prompt_logprobs are not streamed: leave stream out", param="prompt_logprobs")
    for name in ("request_id", "rid"):
        if len(getattr(body, name) or "") > LONGEST_ID:
            raise InvalidRequest(f"{name} has more than {LONGEST_ID} characters", param=name)


def abort_ids(body: OpenAIBody, envelope: Envelope, items: Collection[int]) -> dict[str, Collection[int]]:
    """Returns the ids by which the call's submits `items` can be aborted."""
    return {given: items for given in (envelope.id, body.request_id) if given}


def token_ids(body: OpenAIBody, ids: Sequence[int]) -> dict[str, object]:
    """Returns the field with a choice's token ids, if the body requests it."""
    return {"token_ids": ids} if body.return_token_ids else {}


def of_prompt(body: OpenAIBody, prompt: Prompt) -> dict[str, object]:
    """Returns the fields with a prompt's token ids and log-probabilities, those that the body requests."""
    fields: dict[str, object] = {"prompt_token_ids": prompt.token_ids} if body.return_token_ids else {}
    if body.prompt_logprobs is not None and not body.stream:
        slices = () if prompt.logprobs is None else prompt.logprobs.slices()
        fields["prompt_logprobs"] = logprobs.of_prompt(slices, body.prompt_logprobs)
    return fields


class Envelope:
    """The fields around the choices of one response: id, object, created, model, usage."""

    def __init__(self, service: Service, body: OpenAIBody, prefix: str, kind: str, chunk_kind: str) -> None:
        self.id = body.rid or f"{prefix}-{body.request_id or uuid.uuid4().hex}"
        self._kind = kind
        self._chunk_kind = chunk_kind
        self._created = int(time.time())
        self.model = body.model or service.frontend.adapters.base_names[0]
        options = body.stream_options or StreamOptions()
        self._includes_usage = bool(options.include_usage)
        self._continuous_usage = self._includes_usage and bool(options.continuous_usage_stats)

    def whole(self, choices: Sequence[object], usage: Usage) -> dict[str, object]:
        """Returns the body of a response that is not streamed."""
        return self._around(self._kind, choices) | {"usage": _usage(usage)}

    def chunk(self, choices: Sequence[object], usage: Usage) -> dict[str, object]:
        """Returns one event of a stream. `usage` is that of the event's choice, and is shown only if requested."""
        shown = {"usage": _usage(usage) if self._continuous_usage else None} if self._includes_usage else {}
        return self._around(self._chunk_kind, choices) | shown

    def usage_chunks(self, usage: Usage) -> list[object]:
        """Returns a list with a stream's last event, which has the usage, or an empty list unless it was requested."""
        if not self._includes_usage:
            return []
        return [self._around(self._chunk_kind, []) | {"usage": _usage(usage)}]

    def _around(self, kind: str, choices: Sequence[object]) -> dict[str, object]:
        return {"id": self.id, "object": kind, "created": self._created, "model": self.model, "choices": choices}


def _usage(usage: Usage) -> dict[str, object]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }
