"""The routes POST /tokenize and /detokenize, which convert text to token ids and back."""

from __future__ import annotations

import msgspec
from aiohttp import web

from engine.errors import InvalidRequest
from tokenizer_proc.adapters.tokenizers import TextTools
from tokenizer_proc.http import adapter_access
from tokenizer_proc.http.bodies import decoding
from tokenizer_proc.http.bodies.chat_messages import TemplateKwargs, Turn, chat_messages
from tokenizer_proc.http.dialects.openai import LoraField
from tokenizer_proc.http.encoding import as_json
from tokenizer_proc.http.service import Service
from tokenizer_proc.requests.prompt_encoding import template_arguments
from tokenizer_proc.text.templates.chat_template import ChatRenderer


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


class DetokenizeBody(msgspec.Struct, frozen=True, kw_only=True):
    """The body of /detokenize: token ids, and the model or adapter whose tokenizer decodes them."""

    tokens: list[int]
    model: str | None = None
    lora_path: LoraField | None = None
    skip_special_tokens: bool = False


async def tokenize(service: Service, request: web.Request) -> web.StreamResponse:
    """Encodes text or chat messages; responds with `{"tokens", "count", "max_model_len"}`."""
    body = decoding.decode(await decoding.read(request), TokenizeBody)
    text_tools = await _text_tools(service, request, body)
    text = await _text(body, text_tools.chat)
    special = not body.messages if body.add_special_tokens is None else body.add_special_tokens
    ids = await text_tools.tokenizer.encode_text(text, special)
    return as_json({"tokens": ids, "count": len(ids), "max_model_len": service.frontend.max_length or None})


async def detokenize(service: Service, request: web.Request) -> web.StreamResponse:
    """Decodes token ids; responds with `{"prompt", "text"}`, the same text under vLLM's name and SGLang's."""
    body = decoding.decode(await decoding.read(request), DetokenizeBody)
    tokenizer = (await _text_tools(service, request, body)).tokenizer
    _check(body.tokens, tokenizer.vocab_size)
    text = await tokenizer.decode_ids(body.tokens, skip_special_tokens=body.skip_special_tokens)
    return as_json({"prompt": text, "text": text})


def _check(tokens: list[int], vocab_size: int) -> None:
    if not tokens or 0 <= min(tokens) <= max(tokens) < vocab_size:
        return
    place = next(place for place, token in enumerate(tokens) if not 0 <= token < vocab_size)
    raise InvalidRequest(
        f"tokens[{place}] = {tokens[place]} is outside the vocabulary of {vocab_size} tokens", param=f"tokens[{place}]"
    )


async def _text_tools(service: Service, request: web.Request, body: TokenizeBody | DetokenizeBody) -> TextTools:
    await adapter_access.fetch(service, request, body.model, body.lora_path)
    return service.frontend.text_tools_for(adapter_access.select(service, request, body.model or None, body.lora_path))


async def _text(body: TokenizeBody, template: ChatRenderer) -> str:
    given = [name for name in ("prompt", "text", "messages") if getattr(body, name) is not None]
    asked = [name for name in given if getattr(body, name)] or given[:1]
    if len(asked) != 1:
        raise InvalidRequest("send exactly one of prompt, text and messages", param=asked[1] if asked else "prompt")
    if asked != ["messages"]:
        text: str = getattr(body, asked[0])
        return text
    return await template.prompt(
        chat_messages(body.messages or []),
        add_generation_prompt=body.add_generation_prompt and not body.continue_final_message,
        continue_final_message=body.continue_final_message,
        **template_arguments(body.chat_template_kwargs),
    )
