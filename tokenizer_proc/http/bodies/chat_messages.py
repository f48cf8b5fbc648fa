"""The messages of a chat body: roles, text, and the fields that are refused. Knows no template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from engine.errors import InvalidRequest
from engine.messages import ChatMessage


class TextPart(msgspec.Struct, frozen=True, tag="text", tag_field="type", forbid_unknown_fields=True):
    """A text part of a message's content; parts of other types are refused."""

    text: str


class Turn(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A message of the body.

    The fields after `name` are those of answers, which clients send back unchanged; they must be empty, except a tool
    message's `tool_call_id`, which no template shows.
    """

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_call_id: str | None = None
    refusal: str | None = None
    tool_calls: object = None
    function_call: object = None
    audio: object = None
    annotations: object = None
    reasoning_content: str | None = None


TemplateKwargs = dict[str, str | int | float | bool | None]

_EMPTY = ("refusal", "tool_calls", "function_call", "audio", "annotations", "reasoning_content")


def chat_messages(turns: Sequence[Turn], param: str = "messages") -> list[ChatMessage]:
    """The conversation, with text parts joined by newlines. Raises InvalidRequest with the field's path."""
    if not turns:
        raise InvalidRequest(f"{param} is empty; send at least one message", param=param)
    return [_chat_message(turn, f"{param}[{place}]") for place, turn in enumerate(turns)]


def _chat_message(turn: Turn, at: str) -> ChatMessage:
    for name in _EMPTY:
        if getattr(turn, name):
            raise InvalidRequest(f"{at}.{name} is not supported: messages are text", param=f"{at}.{name}")
    if turn.content is None:
        raise InvalidRequest(f"{at}.content is missing", param=f"{at}.content")
    content = turn.content if isinstance(turn.content, str) else "\n".join(part.text for part in turn.content)
    return ChatMessage(turn.role, content, turn.name)
