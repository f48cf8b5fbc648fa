"""The route POST /v1/chat/completions. The front end renders the messages by the chat template."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import msgspec
from aiohttp import web
from msgspec.structs import replace

from engine.errors import InvalidRequest
from engine.messages import ChatMessage, Delta, PositionLogprobs, SamplingParams, Submit, Usage
from tokenizer_proc.http import adapter_access
from tokenizer_proc.http.auth.rights import tenant_of
from tokenizer_proc.http.batch import TOKEN_BYTES, Batch, Choice
from tokenizer_proc.http.bodies import decoding
from tokenizer_proc.http.bodies.chat_messages import TemplateKwargs, Turn, chat_messages
from tokenizer_proc.http.bodies.fields import SPELLINGS_OPENAI
from tokenizer_proc.http.dialects import logprobs
from tokenizer_proc.http.dialects.openai import Envelope, LoraField, OpenAIBody, abort_ids, check, of_prompt, token_ids
from tokenizer_proc.http.encoding import LARGE_IDS, encoded, json_response
from tokenizer_proc.http.generation import GenerationCall, Writer, answer
from tokenizer_proc.http.intake.body_reader import ACCOUNT, ANSWER
from tokenizer_proc.http.service import Service, deadline_of

MAX_TOP_LOGPROBS = 20  # OpenAI's own bound


class ChatBody(OpenAIBody, frozen=True, kw_only=True):
    """The fields of the body, without the sampling parameters."""

    messages: list[Turn]
    lora_path: LoraField | None = None
    logprobs: bool = False
    top_logprobs: int | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template_kwargs: TemplateKwargs = msgspec.field(default_factory=dict)


async def chat_completions(service: Service, request: web.Request) -> web.StreamResponse:
    """OpenAI's chat completions, streamed or not, with `lora_path` and vLLM's extras such as `top_k`, `ignore_eos`."""
    fields = await decoding.read(request)
    body, params = decoding.split(fields, ChatBody, SPELLINGS_OPENAI)
    check(body, params)
    await adapter_access.fetch(service, request, body.model, body.lora_path)
    lora = adapter_access.select(service, request, body.model or None, body.lora_path)
    submit = _submit(body, lora, replace(params, logprobs=_wanted_logprobs(body), prompt_logprobs=body.prompt_logprobs))
    envelope = Envelope(service, body, "chatcmpl", "chat.completion", "chat.completion.chunk")
    writer = ChatWriter(envelope, body)
    names = decoding.spelt(fields, SPELLINGS_OPENAI) | {"prompt": "messages", "logprobs": "top_logprobs"}
    call = GenerationCall(submits=[submit], ids=abort_ids(body, envelope, [0]), stream=body.stream, names=names)
    return await answer(service, request, call, writer)


async def render(service: Service, request: web.Request) -> web.StreamResponse:
    """Renders a chat without generating: responds with vLLM's `{"request_id", "model", "token_ids", ...}`."""
    fields = await decoding.read(request)
    body, params = decoding.split(fields, ChatBody, SPELLINGS_OPENAI)
    check(body, params)
    await adapter_access.fetch(service, request, body.model, body.lora_path)
    lora = adapter_access.select(service, request, body.model or None, body.lora_path)
    envelope, tenant = Envelope(service, body, "chatcmpl", "", ""), tenant_of(request)
    submit = replace(_submit(body, lora, replace(params, logprobs=_wanted_logprobs(body))), tenant=tenant.name)
    characters = sum(len(one.content) for one in submit.prompt if isinstance(one, ChatMessage))
    with tenant.metered(characters) as meter:
        async with deadline_of(service, request).kept():
            prepared = await service.frontend.prepare(submit)
        meter.used = len(prepared.prompt_ids)
    request[ACCOUNT].add(ANSWER, 2 * TOKEN_BYTES * len(prepared.prompt_ids))
    resolved = replace(
        params, max_tokens=0 if prepared.params.text.scores_only else prepared.params.stopping.max_tokens
    )
    answer = {
        "request_id": envelope.id,
        "model": envelope.model,
        "token_ids": prepared.prompt_ids,
        "sampling_params": msgspec.to_builtins(resolved),
        "stream": body.stream,
        "cache_salt": body.cache_salt or None,
        "priority": body.priority,
    }
    is_large = len(prepared.prompt_ids) > LARGE_IDS
    return json_response(await encoded(service.frontend.pools.python, tenant.name, lambda: answer, is_large))


def _submit(body: ChatBody, lora: LoraField | None, params: SamplingParams) -> Submit:
    if body.continue_final_message and body.add_generation_prompt:
        raise InvalidRequest(
            "continue_final_message and add_generation_prompt exclude each other", param="continue_final_message"
        )
    generates = not body.continue_final_message if body.add_generation_prompt is None else body.add_generation_prompt
    return Submit(
        id=0,
        prompt=[*chat_messages(body.messages)],
        params=params,
        lora=lora,
        chat_template_kwargs=body.chat_template_kwargs,
        add_generation_prompt=generates,
        continue_final_message=body.continue_final_message,
        add_special_tokens=False,  # a chat template writes the special tokens itself
        priority=body.priority,
        cache_salt=body.cache_salt,
        truncate_prompt_tokens=body.truncate_prompt_tokens,
    )


def _wanted_logprobs(body: ChatBody) -> int | None:
    top = body.top_logprobs
    if top is not None and not 0 <= top <= MAX_TOP_LOGPROBS:
        raise InvalidRequest(f"top_logprobs = {top} is not in 0 to {MAX_TOP_LOGPROBS}", param="top_logprobs")
    if top and not body.logprobs:
        raise InvalidRequest("top_logprobs needs logprobs = true", param="top_logprobs")
    return (top or 0) if body.logprobs else None


class ChatWriter(Writer):
    """Writes chat completions. A choice's first event has the role, its last event the finish reason."""

    def __init__(self, envelope: Envelope, body: ChatBody) -> None:
        self._envelope = envelope
        self._body = body

    def events(self, batch: Batch, choice: Choice, delta: Delta) -> list[object]:
        """Returns the events for a delta: one each for the role (first delta only), the text and the finish reason.

        A delta whose tokens show no text, such as a special token, has an event too, so that events count tokens.
        """
        events: list[object] = []
        if choice.deltas == 1:
            events.append(self._beginning(choice))
        scored = self._scored([delta.logprobs]) if delta.logprobs else None
        ids = token_ids(self._body, delta.token_ids)
        if delta.text or scored or (delta.token_ids and not delta.finish_reason):
            events.append(self._chunk(choice, {"content": delta.text}, {"logprobs": scored} | ids))
            ids = token_ids(self._body, [])
        if delta.finish_reason:
            events.append(self._chunk(choice, {}, {"finish_reason": delta.finish_reason} | ids))
        return events

    def last_events(self, batch: Batch) -> list[object]:
        """Returns an event with the usage, if the client requested it."""
        return self._envelope.usage_chunks(batch.usage())

    def whole(self, batch: Batch) -> object:
        """Returns the body of a response that is not streamed: a chat.completion object."""
        whole = self._envelope.whole([self._choice(choice) for choice in batch.choices], batch.usage())
        return whole | of_prompt(self._body, batch.prompts[0])

    def _beginning(self, choice: Choice) -> dict[str, object]:
        """Returns a choice's first event, which has the role and no token yet."""
        one = {
            "index": choice.number,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }
        usage = Usage(choice.usage.prompt_tokens, 0, choice.usage.cached_tokens)
        return self._envelope.chunk([one], usage) | of_prompt(self._body, choice.prompt)

    def _scored(self, slices: Iterable[Sequence[PositionLogprobs | None]]) -> dict[str, object] | None:
        return logprobs.chat(slices, self._body.return_tokens_as_token_ids) if self._body.logprobs else None

    def _choice(self, choice: Choice) -> dict[str, object]:
        return {
            "index": choice.number,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": self._scored(choice.logprobs.slices()),
            "finish_reason": choice.finish_reason,
        } | token_ids(self._body, choice.token_ids)

    def _chunk(
        self, choice: Choice, delta: dict[str, str], fields: Mapping[str, object] | None = None
    ) -> dict[str, object]:
        one = {"index": choice.number, "delta": delta, "logprobs": None, "finish_reason": None, **(fields or {})}
        return self._envelope.chunk([one], choice.usage)
