"""The routes POST /tokenize and /detokenize, which convert text to token ids and back."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from aiohttp import web

from engine.errors import InvalidRequest
from engine.messages import ChatMessage
from tokenizer_proc.adapters.tokenizers import TextTools
from tokenizer_proc.http import adapter_access
from tokenizer_proc.http.auth.rights import tenant_of
from tokenizer_proc.http.batch import TOKEN_BYTES
from tokenizer_proc.http.bodies import decoding
from tokenizer_proc.http.bodies.chat_messages import TemplateKwargs, Turn, chat_messages
from tokenizer_proc.http.dialects.openai import LoraField
from tokenizer_proc.http.encoding import LARGE_IDS, encoded, json_response
from tokenizer_proc.http.intake.body_reader import ACCOUNT, ANSWER
from tokenizer_proc.http.service import Service
from tokenizer_proc.requests.prompt_encoding import template_arguments
from tokenizer_proc.requests.text_work import TextWork
from tokenizer_proc.text.templates.chat_template import ChatRenderer

LARGE_TEXT = 64 << 10  # the number of characters above which the body takes long to encode
CHARACTER_BYTES = 8  # bytes of memory for one character of a text and of its two copies in the body


class TokenizeBody(msgspec.Struct, frozen=True, kw_only=True):
    """The body of /tokenize, with exactly one of `prompt`, `text` and `messages`.

    `add_special_tokens` defaults to False for `messages`, since a chat template writes special tokens itself, and
    otherwise to True.
    """

    model: str | None = None
    lora_path: LoraField | None = None
    prompt: str | None = None
    text: str | None = None
    messages: list[Turn] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: TemplateKwargs = {}
    return_token_strs: bool = False


class DetokenizeBody(msgspec.Struct, frozen=True, kw_only=True):
    """The body of /detokenize: token ids, and the model or adapter whose tokenizer decodes them."""

    tokens: list[int]
    model: str | None = None
    lora_path: LoraField | None = None
    skip_special_tokens: bool = False


async def tokenize(service: Service, request: web.Request) -> web.StreamResponse:
    """Encodes text or chat messages; responds with `{"tokens", "count", "max_model_len"}`.

    With `return_token_strs` the response has `token_strs` too, the tokens as the vocabulary writes them.
    """
    body = decoding.decode(await decoding.read(request), TokenizeBody)
    text_tools = await _text_tools(service, request, body)
    texts, tenant = service.frontend.texts, tenant_of(request)
    field, given = _given(body)
    characters = len(given) if isinstance(given, str) else sum(len(message.content) for message in given)
    special = not body.messages if body.add_special_tokens is None else body.add_special_tokens
    with tenant.metered(characters) as meter:
        text = given if isinstance(given, str) else await _rendered(texts, tenant.name, body, given, text_tools.chat)
        ids = await texts.encode(tenant.name, text_tools.tokenizer, text, special, param=field)
        meter.used = len(ids)
    request[ACCOUNT].add(ANSWER, 2 * TOKEN_BYTES * len(ids))
    name_of = text_tools.tokenizer.name_of

    def answer() -> dict[str, object]:
        names = {"token_strs": [*map(name_of, ids)]} if body.return_token_strs else {}
        return {"tokens": ids, "count": len(ids), "max_model_len": service.frontend.max_length or None} | names

    is_large = len(ids) > LARGE_IDS
    return json_response(await encoded(service.frontend.pools.python, tenant.name, answer, is_large))


async def detokenize(service: Service, request: web.Request) -> web.StreamResponse:
    """Decodes token ids; responds with `{"prompt", "text"}`, the same text under vLLM's name and SGLang's."""
    body = decoding.decode(await decoding.read(request), DetokenizeBody)
    tokenizer, tenant = (await _text_tools(service, request, body)).tokenizer, tenant_of(request)
    account = request[ACCOUNT]
    account.add(ANSWER, len(body.tokens) * tokenizer.longest_token)
    with tenant.metered(len(body.tokens)) as meter:
        text = await service.frontend.texts.decode(tenant.name, tokenizer, body.tokens, body.skip_special_tokens)
        meter.used = len(body.tokens)
    account.set(ANSWER, CHARACTER_BYTES * len(text))

    def answer() -> dict[str, object]:
        written = msgspec.Raw(msgspec.json.encode(text))
        return {"prompt": written, "text": written}

    python = service.frontend.pools.python
    return json_response(await encoded(python, tenant.name, answer, len(text) > LARGE_TEXT))


async def _text_tools(service: Service, request: web.Request, body: TokenizeBody | DetokenizeBody) -> TextTools:
    await adapter_access.fetch(service, request, body.model, body.lora_path)
    return service.frontend.text_tools_for(adapter_access.select(service, request, body.model or None, body.lora_path))


def _given(body: TokenizeBody) -> tuple[str, str | list[ChatMessage]]:
    """Returns the name of the field that gives the text, and the text, or the messages to render."""
    given = [name for name in ("prompt", "text", "messages") if getattr(body, name) is not None]
    asked = [name for name in given if getattr(body, name)] or given[:1]
    if len(asked) != 1:
        raise InvalidRequest("send exactly one of prompt, text and messages", param=asked[1] if asked else "prompt")
    if asked == ["messages"]:
        return "messages", chat_messages(body.messages or [])
    return asked[0], getattr(body, asked[0])


async def _rendered(
    texts: TextWork, tenant: str, body: TokenizeBody, messages: Sequence[ChatMessage], template: ChatRenderer
) -> str:
    return await texts.render(
        tenant,
        template,
        messages,
        add_generation_prompt=body.add_generation_prompt and not body.continue_final_message,
        continue_final_message=body.continue_final_message,
        arguments=template_arguments(body.chat_template_kwargs),
    )
