"""The arguments of tool calls: JSON inside strings of the body has bounds of its own."""

from __future__ import annotations

import json

import pytest

from engine.errors import InvalidRequest
from tokenizer_proc.http.bodies.chat_messages import MAX_ARGUMENTS, Function, ToolCall, Turn, chat_messages
from tokenizer_proc.http.intake.shape import MAX_CONTAINERS, MAX_DEPTH, MAX_EXPONENTS, MAX_FIELD_VALUES


def turns(*arguments: str) -> list[Turn]:
    return [Turn(role="assistant", tool_calls=[ToolCall(function=Function("f", each))]) for each in arguments]


@pytest.mark.parametrize(
    "arguments",
    [
        [json.dumps({"a": "x" * MAX_ARGUMENTS})],
        ['{"a": [%s0]}' % ("1e300," * (MAX_EXPONENTS + 1))],
        ['{"a": 1e300, "b": "some more text"}'] * (MAX_EXPONENTS + 1),
        ['{"a": [%s0]}' % ("0," * MAX_FIELD_VALUES)],
        ['{"a": [%s0]}' % ("0," * (MAX_FIELD_VALUES // 2))] * 3,
        ['{"a": [%s[]]}' % ("[]," * MAX_CONTAINERS)],
        ['{{"a": {}{}, "b": "{}"}}'.format("[" * MAX_DEPTH, "]" * MAX_DEPTH, "x" * 5000)],
    ],
    ids=["long", "exponents", "exponents-of-many-calls", "values", "values-of-many-calls", "lists", "deep"],
)
def test_arguments_that_take_long_are_refused(arguments: list[str]) -> None:
    with pytest.raises(InvalidRequest, match="arguments of the tool calls") as raised:
        chat_messages(turns(*arguments))
    assert raised.value.param == "messages"


def test_arguments_of_long_texts_are_taken() -> None:
    given = {"path": "a.json", "text": "[1e300, {}, " * 30_000}
    texts = [json.dumps(given)] * 2
    for message in chat_messages(turns(*texts)):
        assert message.tool_calls is not None
        assert message.tool_calls[0]["function"] == {"name": "f", "arguments": given}
    with pytest.raises(InvalidRequest, match="must be a JSON object"):
        chat_messages(turns("'" * 5000))
