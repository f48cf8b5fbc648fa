"""Encodes a submit's prompt: text, chat messages (rendered by the chat template first), or token ids as they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from engine.errors import InvalidRequest
from engine.messages import ChatMessage, Submit
from tokenizer_proc.adapters.tokenizers import TextTools
from tokenizer_proc.requests.text_work import MOST_TOKENS, TextWork
from tokenizer_proc.text.templates.chat_template import Value
from tokenizer_proc.text.tokenizer import Tokenizer, TooManyTokens

_NOT_TEMPLATE_ARGUMENTS = ("self", "messages", "add_generation_prompt", "continue_final_message")


async def encode_prompt(submit: Submit, text_tools: TextTools, max_length: int, texts: TextWork) -> list[int]:
    """Returns the prompt's token ids, truncated as the submit asks. `texts` does the work.

    Raises InvalidRequest for a prompt that certainly exceeds `max_length` tokens, that mixes ids and messages, or that
    the chat template or the tokenizer refuses.
    """
    if submit.truncate_prompt_tokens is None:
        return await _encode(submit, text_tools, max_length, texts)
    kept = _kept(submit, submit.truncate_prompt_tokens, max_length)
    ids = await _encode(submit, text_tools, MOST_TOKENS, texts)
    return ids[-kept:]


def _kept(submit: Submit, truncated: int, max_length: int) -> int:
    """Returns how many tokens of the prompt are kept; for -1 as many as leave room for the output."""
    if not -1 <= truncated < max_length or truncated == 0:
        raise InvalidRequest(
            f"truncate_prompt_tokens = {truncated}: -1 (as many as fit), or 1 to {max_length - 1}",
            param="truncate_prompt_tokens",
        )
    if truncated > 0:
        return truncated
    asked = submit.params.max_tokens
    return max(1, max_length - max(1, (submit.default_max_tokens or 1) if asked is None else asked))


async def _encode(submit: Submit, text_tools: TextTools, max_length: int, texts: TextWork) -> list[int]:
    prompt, tokenizer = submit.prompt, text_tools.tokenizer
    if isinstance(prompt, str):
        return await _encode_text(submit, prompt, tokenizer, submit.add_special_tokens, max_length, texts)
    if len(prompt) > max_length:  # each id is one token, each message at least one
        raise _too_long(f"the prompt has {len(prompt)} parts; this model's context is {max_length} tokens")
    kinds = set(map(type, prompt))
    if ChatMessage not in kinds:
        return cast(list[int], list(prompt))
    if len(kinds) > 1:
        raise InvalidRequest("a prompt is token ids or messages, not both", param="prompt")
    messages = cast(list[ChatMessage], prompt)
    text = await texts.render(
        submit.tenant,
        text_tools.chat,
        messages,
        add_generation_prompt=submit.add_generation_prompt,
        continue_final_message=submit.continue_final_message,
        arguments=template_arguments(submit.chat_template_kwargs),
    )
    return await _encode_text(submit, text, tokenizer, False, max_length, texts)


def template_arguments(given: Mapping[str, Value]) -> dict[str, Any]:
    """Returns a copy of `given`, the chat_template_kwargs of a call.

    Raises InvalidRequest for an argument that has its own field in the body, such as `messages`.
    """
    for name in _NOT_TEMPLATE_ARGUMENTS:
        if name in given:
            raise InvalidRequest(
                f"`{name}` is a field of its own, not one of chat_template_kwargs", param="chat_template_kwargs"
            )
    return dict(given)


async def _encode_text(
    submit: Submit, text: str, tokenizer: Tokenizer, special: bool, max_length: int, texts: TextWork
) -> list[int]:
    """Returns the ids of `text`. A text with too many characters for `max_length` tokens is refused before encoding."""
    if len(text) > max_length * tokenizer.longest_token:
        raise _too_long(
            f"the prompt has {len(text)} characters; this model's context is {max_length} tokens, "
            f"and no token stands for more than {tokenizer.longest_token} characters"
        )
    try:
        return await texts.encode(submit.tenant, tokenizer, text, special, max_length)
    except TooManyTokens as error:
        if submit.truncate_prompt_tokens is not None:
            raise _too_long(f"the prompt has {error.count} tokens; at most {max_length} are truncated") from error
        raise _too_long(
            f"the prompt has {error.count} tokens; this model's context is {max_length} tokens, "
            "and at least one must be left for the answer"
        ) from error


def _too_long(message: str) -> InvalidRequest:
    return InvalidRequest(message, param="prompt", code="context_length_exceeded")
