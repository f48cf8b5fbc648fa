"""The messages of a chat body: their types, and their conversion to ChatMessages."""

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
    """One message in the body.

    Clients send a response's messages back unchanged, so the fields after `name` are those that responses have. They
    must be empty, except `tool_call_id` of a tool message, which is ignored.
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
    """Converts the body's messages to ChatMessages, joining text parts by newlines.

    Raises an InvalidRequest that names the field by its path, which begins with `param`.
    """
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
