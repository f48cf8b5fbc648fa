"""The messages of a chat body: their types, and their conversion to ChatMessages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from engine.errors import InvalidRequest
from engine.messages import ChatMessage
from tokenizer_proc.http.intake.shape import MAX_FIELD_VALUES, ShapeScan

MAX_ARGUMENTS = 1 << 20  # characters of the arguments of all tool calls of a chat
UNSCANNED_ARGUMENTS = 4 << 10  # characters that are decoded without a scan


class TextPart(msgspec.Struct, frozen=True, tag="text", tag_field="type", forbid_unknown_fields=True):
    """A text part of a message's content; parts of other types are refused."""

    text: str


class Function(msgspec.Struct, frozen=True):
    """The function of a tool call. `arguments` is JSON text in OpenAI's bodies, and may be the object itself."""

    name: str
    arguments: str | dict[str, object] = ""


class ToolCall(msgspec.Struct, frozen=True, kw_only=True):
    """A tool call of an earlier answer, which the client sends back."""

    function: Function
    id: str | None = None
    type: Literal["function"] = "function"
    index: int | None = None


class Turn(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One message in the body.

    Clients send a response's messages back unchanged, so the last fields are those that responses have. They must be
    empty.
    """

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: list[ToolCall] | None = None
    refusal: str | None = None
    function_call: object = None
    audio: object = None
    annotations: object = None
    reasoning_content: str | None = None


TemplateKwargs = dict[str, str | int | float | bool | None]

_EMPTY = ("refusal", "function_call", "audio", "annotations", "reasoning_content")


def chat_messages(turns: Sequence[Turn], param: str = "messages") -> list[ChatMessage]:
    """Converts the body's messages to ChatMessages, joining text parts by newlines.

    Raises an InvalidRequest that names the field by its path, which begins with `param`.
    """
    if not turns:
        raise InvalidRequest(f"{param} is empty; send at least one message", param=param)
    _check_arguments(turns, param)
    return [_chat_message(turn, f"{param}[{place}]") for place, turn in enumerate(turns)]


def _check_arguments(turns: Sequence[Turn], param: str) -> None:
    """Raises InvalidRequest for arguments of tool calls, JSON inside strings of the body, that take long to decode."""
    calls = [call.function.arguments for turn in turns for call in turn.tool_calls or ()]
    texts = [arguments for arguments in calls if isinstance(arguments, str)]
    size, what = sum(map(len, texts)), f"{param}: the arguments of the tool calls"
    if size > MAX_ARGUMENTS:
        text = f"{what} have {size} characters together; at most {MAX_ARGUMENTS} are taken"
        raise InvalidRequest(text, param=param, code="text_too_long")
    if size <= UNSCANNED_ARGUMENTS:
        return
    scan = ShapeScan()
    try:
        scan.feed(b"[%b]" % ",".join(texts).encode("utf-8", "surrogatepass"))
    except InvalidRequest as error:
        raise InvalidRequest(f"{what}: {error.message}", param=param, code=error.code) from error
    if scan.values > MAX_FIELD_VALUES:
        text = f"{what} hold more than {MAX_FIELD_VALUES} values together"
        raise InvalidRequest(text, param=param, code="too_many_values")


def _chat_message(turn: Turn, at: str) -> ChatMessage:
    for name in _EMPTY:
        if getattr(turn, name):
            raise InvalidRequest(f"{at}.{name} is not supported: messages are text", param=f"{at}.{name}")
    if turn.content is None and turn.role != "assistant":
        raise InvalidRequest(f"{at}.content is missing", param=f"{at}.content")
    if turn.tool_calls and turn.role != "assistant":
        raise InvalidRequest(f"{at}.tool_calls: only an assistant's message has tool calls", param=f"{at}.tool_calls")
    content = turn.content if isinstance(turn.content, str) else "\n".join(part.text for part in turn.content or ())
    calls = [_tool_call(call, f"{at}.tool_calls[{place}]") for place, call in enumerate(turn.tool_calls or ())]
    return ChatMessage(turn.role, content, turn.name, calls or None, turn.tool_call_id)


def _tool_call(call: ToolCall, at: str) -> dict[str, object]:
    """Returns the call for a template, with its arguments as an object."""
    function = {
        "name": call.function.name,
        "arguments": _arguments(call.function.arguments, f"{at}.function.arguments"),
    }
    return ({} if call.id is None else {"id": call.id}) | {"type": call.type, "function": function}


def _arguments(given: str | dict[str, object], at: str) -> dict[str, object]:
    if isinstance(given, dict):
        return given
    try:
        return msgspec.json.decode(given, type=dict[str, object]) if given.strip() else {}
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise InvalidRequest(f"{at} must be a JSON object", param=at) from error
