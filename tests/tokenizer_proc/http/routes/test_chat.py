"""Chat completions: responses in OpenAI's format, streamed and not."""

from __future__ import annotations

from typing import Any

import pytest
from fixtures.serving.api_calls import error, ok, post, stream
from fixtures.serving.fake_frontend import FakeFrontend

from engine.messages import ChatMessage

PATH = "/v1/chat/completions"
BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "a"}]}
PROMPT = len("user: a\nassistant:")


def test_whole_answer() -> None:
    answer = ok(post(FakeFrontend(), PATH, BODY | {"n": 2, "model": "org/Base-1"}))
    assert answer["id"].startswith("chatcmpl-")
    assert (answer["object"], answer["model"]) == ("chat.completion", "org/Base-1")
    assert [choice["message"]["content"] for choice in answer["choices"]] == ["Hi é0", "Hi é1"]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert {choice["finish_reason"] for choice in answer["choices"]} == {"stop"}
    assert answer["usage"] == {
        "prompt_tokens": PROMPT,
        "completion_tokens": 14,
        "total_tokens": PROMPT + 14,
        "prompt_tokens_details": {"cached_tokens": 2},
    }


def test_without_a_length_the_answer_may_fill_the_context() -> None:
    frontend = FakeFrontend()
    ok(post(frontend, PATH, BODY))
    assert frontend.submits[0].params.max_tokens is None
    assert frontend.submits[0].default_max_tokens is None


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_max_tokens_ends_with_finish_reason_length(name: str) -> None:
    answer = ok(post(FakeFrontend(), PATH, BODY | {name: 2}))
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["choices"][0]["message"]["content"] == "Hi"


def test_both_lengths_may_agree() -> None:
    ok(post(FakeFrontend(), PATH, BODY | {"max_tokens": 2, "max_completion_tokens": 2}))


def test_stream_has_role_text_and_finish_reason() -> None:
    events = stream(FakeFrontend(), PATH, BODY | {"n": 2, "stream_options": {"include_usage": True}})
    assert events.pop() == "[DONE]"
    usage = events.pop()
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 14
    assert len({event["id"] for event in [*events, usage]}) == 1
    assert all(event["object"] == "chat.completion.chunk" and event["usage"] is None for event in events)
    for index in (0, 1):
        own = [event["choices"][0] for event in events if event["choices"][0]["index"] == index]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(one["delta"].get("content", "") for one in own) == f"Hi é{index}"
        assert [one["finish_reason"] for one in own] == [None] * (len(own) - 1) + ["stop"]
        assert all("role" not in one["delta"] for one in own[1:])


def test_stream_has_no_usage_unless_asked() -> None:
    events = stream(FakeFrontend(), PATH, BODY)
    assert all("usage" not in event for event in events[:-1])


def test_logprobs_have_openais_shape() -> None:
    answer = ok(post(FakeFrontend(), PATH, BODY | {"logprobs": True, "top_logprobs": 2}))
    content = answer["choices"][0]["logprobs"]["content"]
    assert bytes(byte for token in content[:-1] for byte in token["bytes"]).decode() == "Hi é0"
    assert [token["logprob"] for token in content] == [-1.0] * 6 + [-9999.0]
    assert [len(token["top_logprobs"]) for token in content] == [2] * 7
    assert set(content[0]["top_logprobs"][0]) == {"token", "logprob", "bytes"}


def test_streamed_logprobs_equal_unstreamed_ones() -> None:
    body = BODY | {"logprobs": True}
    whole = ok(post(FakeFrontend(), PATH, body))["choices"][0]["logprobs"]["content"]
    events = stream(FakeFrontend(), PATH, body)[:-1]
    scored = [event["choices"][0]["logprobs"] for event in events]
    assert [token for one in scored if one for token in one["content"]] == whole
    assert all(token["top_logprobs"] == [] for token in whole)


def test_logprobs_are_null_unless_asked() -> None:
    assert ok(post(FakeFrontend(), PATH, BODY | {"logprobs": False}))["choices"][0]["logprobs"] is None


def test_messages_of_every_kind_become_the_prompt() -> None:
    frontend = FakeFrontend()
    turns = [
        {"role": "system", "content": "s"},
        {"role": "developer", "content": "d"},
        {"role": "user", "content": [{"type": "text", "text": "u1"}, {"type": "text", "text": "u2"}], "name": "ann"},
        {"role": "assistant", "content": "a", "refusal": None, "tool_calls": None, "audio": None, "annotations": []},
        {"role": "tool", "content": "t", "tool_call_id": "1"},
    ]
    ok(post(frontend, PATH, {"messages": turns}))
    assert frontend.submits[0].prompt == [
        ChatMessage("system", "s"),
        ChatMessage("developer", "d"),
        ChatMessage("user", "u1\nu2", "ann"),
        ChatMessage("assistant", "a"),
        ChatMessage("tool", "t", tool_call_id="1"),
    ]


CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": [1, 2.5]}'}}


def test_a_history_with_tool_calls_becomes_the_prompt() -> None:
    frontend = FakeFrontend()
    turns = [{"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "assistant", "content": None}]
    ok(post(frontend, PATH, {"messages": turns}))
    call = CALL | {"function": {"name": "add", "arguments": {"a": [1, 2.5]}}}
    assert frontend.submits[0].prompt == [ChatMessage("assistant", "", tool_calls=[call]), ChatMessage("assistant", "")]


@pytest.mark.parametrize("arguments", ["{", "[]", "1", "[" * 3000])
def test_arguments_of_a_tool_call_that_are_no_object_are_refused(arguments: str) -> None:
    call = {"function": {"name": "add", "arguments": arguments}}
    body = {"messages": [{"role": "assistant", "tool_calls": [call]}]}
    assert error(post(FakeFrontend(), PATH, body))["param"] == "messages[0].tool_calls[0].function.arguments"


def test_tool_calls_of_a_user_are_refused() -> None:
    body = {"messages": [{"role": "user", "content": "a", "tool_calls": [CALL]}]}
    assert error(post(FakeFrontend(), PATH, body))["param"] == "messages[0].tool_calls"


def test_template_fields() -> None:
    frontend = FakeFrontend()
    ok(post(frontend, PATH, BODY | {"chat_template_kwargs": {"mood": "glad"}, "add_special_tokens": False}))
    ok(post(frontend, PATH, BODY | {"continue_final_message": True}))
    ok(post(frontend, PATH, BODY))
    first, second, third = frontend.submits
    assert (first.chat_template_kwargs, first.add_special_tokens) == ({"mood": "glad"}, False)
    assert (second.continue_final_message, second.add_generation_prompt) == (True, False)
    assert (third.add_special_tokens, third.add_generation_prompt) == (False, True)


@pytest.mark.parametrize(
    ("fields", "lora"),
    [
        ({}, None),
        ({"model": ""}, None),
        ({"model": "base"}, None),
        ({"model": "pirate"}, "pirate"),
        ({"model": "org/Base-1:pirate"}, "pirate"),
        ({"model": "base", "lora_path": "pirate"}, "pirate"),
        ({"lora_path": {"pirate": 0.5, "poet": 0.25}}, {"pirate": 0.5, "poet": 0.25}),
    ],
)
def test_adapters_are_named_by_model_or_lora_path(fields: dict[str, Any], lora: Any) -> None:
    frontend = FakeFrontend("pirate", "poet")
    answer = ok(post(frontend, PATH, BODY | fields))
    assert frontend.submits[0].lora == lora
    assert answer["model"] == (fields.get("model") or "base")
