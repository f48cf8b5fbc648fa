"""The parts that the routes for chat and for completions share: common body fields, and the response's envelope."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence

import msgspec

from engine.errors import InvalidRequest
from engine.messages import AdapterMix, SamplingParams, Usage
from tokenizer_proc.http.service import Service

LoraField = str | AdapterMix


class StreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """OpenAI's `stream_options`. `include_obfuscation`, which requests padding against eavesdroppers, has no effect."""

    include_usage: bool | None = False
    include_obfuscation: bool | None = False


class OpenAIBody(msgspec.Struct, frozen=True, kw_only=True):
    """The body fields that both routes have, without the sampling parameters."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    best_of: int | None = None
    priority: int = 0


def check(body: OpenAIBody, params: SamplingParams) -> None:
    """Raises InvalidRequest for fields that contradict each other."""
    if body.stream_options is not None and any(msgspec.structs.astuple(body.stream_options)) and not body.stream:
        raise InvalidRequest("stream_options needs stream = true", param="stream_options")
    if body.best_of is not None and body.best_of != params.n:
        raise InvalidRequest(f"best_of = {body.best_of} other than n = {params.n} is not supported", param="best_of")


class Envelope:
    """The fields around the choices of one response: id, object, created, model, usage."""

    def __init__(self, service: Service, body: OpenAIBody, prefix: str, kind: str, chunk_kind: str) -> None:
        self.id = f"{prefix}-{uuid.uuid4().hex}"
        self._kind = kind
        self._chunk_kind = chunk_kind
        self._created = int(time.time())
        self._model = body.model or service.frontend.adapters.base_names[0]
        self._include_usage = body.stream_options is not None and bool(body.stream_options.include_usage)

    def whole(self, choices: Sequence[object], usage: Usage) -> dict[str, object]:
        """Returns the body of a response that is not streamed."""
        return self._around(self._kind, choices) | {"usage": _usage(usage)}

    def chunk(self, choices: Sequence[object]) -> dict[str, object]:
        """Returns one event of a stream."""
        return self._around(self._chunk_kind, choices) | ({"usage": None} if self._include_usage else {})

    def usage_chunks(self, usage: Usage) -> list[object]:
        """Returns a list with a stream's last event, which has the usage, or an empty list unless it was requested."""
        return [self.chunk([]) | {"usage": _usage(usage)}] if self._include_usage else []

    def _around(self, kind: str, choices: Sequence[object]) -> dict[str, object]:
        return {"id": self.id, "object": kind, "created": self._created, "model": self._model, "choices": choices}


def _usage(usage: Usage) -> dict[str, object]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }
