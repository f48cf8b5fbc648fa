"""Every body field is used, ignored because it cannot change the output, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest
from fixtures.serving.api_calls import error, ok, post
from fixtures.serving.fake_frontend import FakeFrontend

CHAT = ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]})
COMPLETION = ("/v1/completions", {"prompt": "a"})
NATIVE = ("/generate", {"text": "a"})
OPENAI = [CHAT, COMPLETION]
ALL = [CHAT, COMPLETION, NATIVE]

IGNORED: dict[str, Any] = {
    "user": "u1",
    "metadata": {"a": "b"},
    "store": True,
    "service_tier": "auto",
    "safety_identifier": "x",
    "prompt_cache_key": "k",
    "parallel_tool_calls": False,
}

NEUTRAL: dict[str, Any] = {
    "tools": [],
    "tool_choice": "none",
    "response_format": {"type": "text"},
    "modalities": ["text"],
    "use_beam_search": False,
    "best_of": 1,
    "stream": False,
}

REFUSED: dict[str, Any] = {
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "tool_choice": "required",
    "functions": [{"name": "f"}],
    "function_call": {"name": "f"},
    "response_format": {"type": "json_object"},
    "modalities": ["text", "audio"],
    "audio": {"voice": "alloy"},
    "prediction": {"type": "content", "content": "x"},
    "best_of": 3,
    "suffix": "end",
    "reasoning_effort": "low",
    "verbosity": "low",
    "web_search_options": {"search_context_size": "low"},
    "guided_json": {"type": "object"},
    "use_beam_search": True,
    "length_penalty": 1.5,
    "chat_template": "{{ x }}",
    "temprature": 0.5,
}

TAKEN: dict[str, Any] = {
    "top_k": 5,
    "min_p": 0.1,
    "repetition_penalty": 1.1,
    "presence_penalty": 0.5,
    "frequency_penalty": -0.5,
    "temperature": 0,
    "top_p": 0.5,
    "n": 2,
    "seed": 3,
    "ignore_eos": True,
    "stop_token_ids": [5],
    "min_tokens": 2,
    "max_tokens": 9,
    "skip_special_tokens": False,
    "include_stop_str_in_output": True,
    "logit_bias": {"5": -3},
    "stop": ["x", "y"],
}


@pytest.mark.parametrize("name", IGNORED)
@pytest.mark.parametrize(("path", "body"), ALL)
def test_fields_that_cannot_change_the_answer_are_ignored(path: str, body: dict[str, Any], name: str) -> None:
    plain, with_it = FakeFrontend(), FakeFrontend()
    ok(post(plain, path, body))
    ok(post(with_it, path, body | {name: IGNORED[name]}))
    assert plain.submits == with_it.submits


@pytest.mark.parametrize("name", NEUTRAL)
@pytest.mark.parametrize(("path", "body"), OPENAI)
def test_fields_with_neutral_values_are_taken(path: str, body: dict[str, Any], name: str) -> None:
    ok(post(FakeFrontend(), path, body | {name: NEUTRAL[name]}))


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize(("path", "body"), OPENAI)
def test_fields_that_change_the_answer_are_refused_by_name(path: str, body: dict[str, Any], name: str) -> None:
    frontend = FakeFrontend()
    found = error(post(frontend, path, body | {name: REFUSED[name]}))
    assert found["param"] == name
    assert name in found["message"]
    assert found["type"] == "invalid_request_error"
    assert not frontend.submits


@pytest.mark.parametrize("name", [*REFUSED, *TAKEN, "model", "stream_options", "lora_path", "stream"])
@pytest.mark.parametrize(("path", "body"), OPENAI)
def test_null_is_absent(path: str, body: dict[str, Any], name: str) -> None:
    ok(post(FakeFrontend(), path, body | {name: None}))


@pytest.mark.parametrize("name", TAKEN)
@pytest.mark.parametrize(("path", "body"), OPENAI)
def test_sampling_fields_arrive(path: str, body: dict[str, Any], name: str) -> None:
    frontend = FakeFrontend()
    ok(post(frontend, path, body | {name: TAKEN[name]}))
    expected = {5: -3.0} if name == "logit_bias" else TAKEN[name]
    assert getattr(frontend.submits[0].params, name) == expected


@pytest.mark.parametrize("name", [name for name in TAKEN if name not in ("min_tokens", "max_tokens")])
def test_sampling_fields_arrive_at_generate(name: str) -> None:
    frontend = FakeFrontend()
    ok(post(frontend, "/generate", {"text": "a", "sampling_params": {name: TAKEN[name]}}))
    expected = {5: -3.0} if name == "logit_bias" else TAKEN[name]
    assert getattr(frontend.submits[0].params, name) == expected


@pytest.mark.parametrize(
    ("spelling", "field"),
    [("max_new_tokens", "max_tokens"), ("min_new_tokens", "min_tokens"), ("sampling_seed", "seed")],
)
def test_native_spellings(spelling: str, field: str) -> None:
    frontend = FakeFrontend()
    ok(post(frontend, "/generate", {"text": "a", "sampling_params": {spelling: 4}}))
    assert getattr(frontend.submits[0].params, field) == 4


@pytest.mark.parametrize("name", ["regex", "json_schema", "ebnf", "structural_tag", "max_token"])
def test_native_sampling_fields_are_refused_with_their_path(name: str) -> None:
    found = error(post(FakeFrontend(), "/generate", {"text": "a", "sampling_params": {name: "x"}}))
    assert found["param"] == f"sampling_params.{name}"
    ok(post(FakeFrontend(), "/generate", {"text": "a", "sampling_params": {name: None}}))


@pytest.mark.parametrize("name", ["image_data", "lora_id", "input_embeds", "model", "temperature"])
def test_native_fields_are_refused_by_name(name: str) -> None:
    assert error(post(FakeFrontend(), "/generate", {"text": "a", name: "x"}))["param"] == name


WRONG = [
    (CHAT, {"temperature": "hot"}, "temperature"),
    (CHAT, {"n": True}, "n"),
    (CHAT, {"n": 1.5}, "n"),
    (CHAT, {"max_completion_tokens": "many"}, "max_completion_tokens"),
    (CHAT, {"stop": 3}, "stop"),
    (CHAT, {"stop": ["a", 3]}, "stop[1]"),
    (CHAT, {"logit_bias": {"x": 1}}, "logit_bias"),
    (CHAT, {"messages": "hello"}, "messages"),
    (CHAT, {"messages": []}, "messages"),
    (CHAT, {"messages": [{"role": "pirate", "content": "a"}]}, "messages[0].role"),
    (CHAT, {"messages": [{"content": "a"}]}, "messages[0].role"),
    (CHAT, {"messages": [{"role": "user"}]}, "messages[0].content"),
    (CHAT, {"messages": [{"role": "user", "content": "a", "mood": 1}]}, "messages[0].mood"),
    (CHAT, {"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]}, "messages[0].tool_calls[0].function"),
    (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages[0].content[0].type",
    ),
    (CHAT, {"stream_options": {"include_usage": True}}, "stream_options"),
    (CHAT, {"stream": True, "stream_options": {"include_usages": True}}, "stream_options.include_usages"),
    (CHAT, {"top_logprobs": 3}, "top_logprobs"),
    (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    (CHAT, {"logprobs": 3}, "logprobs"),
    (CHAT, {"max_tokens": -1}, "max_tokens"),
    (CHAT, {"temperature": -1}, "temperature"),
    (CHAT, {"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
    (CHAT, {"lora_path": 3}, "lora_path"),
    (CHAT, {"add_special_tokens": True}, "add_special_tokens"),
    (CHAT, {"max_completion_tokens": 9999}, "max_completion_tokens"),
    (CHAT, {"messages": [{"role": "user", "content": "a" * 600}]}, "messages"),
    (COMPLETION, {"logprobs": 21}, "logprobs"),
    (NATIVE, {"text": "a" * 600}, "text"),
    (NATIVE, {"sampling_params": {"max_new_tokens": -1}}, "sampling_params.max_new_tokens"),
    (NATIVE, {"return_logprob": True, "top_logprobs_num": 99}, "top_logprobs_num"),
    (COMPLETION, {"prompt": []}, "prompt"),
    (COMPLETION, {"prompt": ["a", 3]}, "prompt"),
    (COMPLETION, {"prompt": {"a": 1}}, "prompt"),
    (COMPLETION, {"prompt": None}, "prompt"),
    (COMPLETION, {"prompt": [1, 9999]}, "prompt"),
    (COMPLETION, {"logprobs": True}, "logprobs"),
    (COMPLETION, {"max_tokens": -1}, "max_tokens"),
    (COMPLETION, {"seed": 2**70}, "seed"),
    (COMPLETION, {"prompt": ["a", "b"], "lora_path": ["x"]}, "lora_path"),
    (NATIVE, {"input_ids": [1]}, "input_ids"),
    (NATIVE, {"text": None}, "text"),
    (NATIVE, {"text": []}, "text"),
    (NATIVE, {"text": ["a", "b"], "sampling_params": [{}]}, "sampling_params"),
    (NATIVE, {"text": ["a"], "sampling_params": [{"top_p": "x"}]}, "sampling_params[0].top_p"),
    (NATIVE, {"sampling_params": {"max_tokens": 3, "max_new_tokens": 4}}, "sampling_params.max_new_tokens"),
    (NATIVE, {"text": ["a", "b"], "rid": ["x"]}, "rid"),
    (NATIVE, {"return_logprob": True, "logprob_start_len": 99}, "logprob_start_len"),
    (NATIVE, {"return_logprob": True, "logprob_start_len": -2}, "logprob_start_len"),
]


@pytest.mark.parametrize(("call", "change", "param"), WRONG, ids=[f"{one[0][0]}-{one[2]}" for one in WRONG])
def test_bad_values_name_their_field(call: tuple[str, dict[str, Any]], change: dict[str, Any], param: str) -> None:
    frontend = FakeFrontend()
    found = error(post(frontend, call[0], call[1] | change))
    assert found["param"] == param


def test_errors_say_what_is_wrong() -> None:
    part = {"type": "image_url", "image_url": {"url": "x"}}
    body = {"messages": [{"role": "user", "content": [part]}]}
    assert "only text" in error(post(FakeFrontend(), CHAT[0], body))["message"]
    missing = error(post(FakeFrontend(), CHAT[0], {"messages": [{"content": "x"}]}))["message"]
    assert missing == "messages[0].role: is missing"
