"""Completions: prompts of every kind, several choices, echo and the legacy log-probabilities."""

from __future__ import annotations

from typing import Any

import pytest
from fixtures.serving.api_calls import ok, post, stream
from fixtures.serving.fake_frontend import BOS, EOS, FakeFrontend

PATH = "/v1/completions"


def _streamed(frontend: FakeFrontend, body: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Returns the choices of a stream, joined by index: text, logprobs, finish_reason."""
    events = stream(frontend, PATH, body)
    assert events.pop() == "[DONE]"
    choices: dict[int, dict[str, Any]] = {}
    for event in events:
        for one in event["choices"]:
            found = choices.setdefault(one["index"], {"text": "", "logprobs": None, "finish_reason": None})
            assert found["finish_reason"] is None
            found["text"] += one["text"]
            found["finish_reason"] = one["finish_reason"]
            if one["logprobs"] is not None:
                into = found["logprobs"] = found["logprobs"] or {name: [] for name in one["logprobs"]}
                for name, values in one["logprobs"].items():
                    into[name] += values
    return choices


@pytest.mark.parametrize(
    ("prompt", "submitted"),
    [
        ("ab", ["ab"]),
        (["ab", "c"], ["ab", "c"]),
        ([97, 98], [[97, 98]]),
        ([[97, 98], [99]], [[97, 98], [99]]),
    ],
)
def test_prompts_of_every_kind_are_submitted(prompt: Any, submitted: Any) -> None:
    frontend = FakeFrontend()
    answer = ok(post(frontend, PATH, {"prompt": prompt}))
    assert [one.prompt for one in frontend.submits] == submitted
    assert {one.default_max_tokens for one in frontend.submits} == {16}
    assert [choice["text"] for choice in answer["choices"]] == ["Hi é0"] * len(submitted)
    assert (answer["object"], answer["model"]) == ("text_completion", "base")


def test_several_prompts_and_choices_are_numbered_prompt_major() -> None:
    body = {"prompt": ["a", "bb"], "n": 2, "max_tokens": 8}
    answer = ok(post(FakeFrontend(), PATH, body))
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert [choice["text"] for choice in answer["choices"]] == ["Hi é0", "Hi é1"] * 2
    assert answer["usage"]["prompt_tokens"] == 2 + 3
    assert answer["usage"]["completion_tokens"] == 4 * 7
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 4}


def test_a_stream_of_choices_equals_the_unstreamed_answer() -> None:
    body = {"prompt": ["a", "bb"], "n": 2, "logprobs": 2, "echo": True}
    whole = ok(post(FakeFrontend(), PATH, body))["choices"]
    streamed = _streamed(FakeFrontend(), body)
    assert sorted(streamed) == [0, 1, 2, 3]
    for choice in whole:
        assert streamed[choice["index"]] == {name: choice[name] for name in ("text", "logprobs", "finish_reason")}


def test_stream_usage_comes_last() -> None:
    events = stream(FakeFrontend(), PATH, {"prompt": "a", "stream_options": {"include_usage": True}})
    assert events[-2]["usage"]["total_tokens"] == 9
    assert events[-2]["choices"] == []


def test_logprobs_have_openais_legacy_shape() -> None:
    found = ok(post(FakeFrontend(), PATH, {"prompt": "a", "logprobs": 1}))["choices"][0]["logprobs"]
    assert found["tokens"] == ["H", "i", " ", "\ufffd", "\ufffd", "0", "</s>"]
    assert found["text_offset"] == [0, 1, 2, 3, 3, 4, 5]
    assert found["token_logprobs"] == [-1.0] * 6 + [-9999.0]
    assert found["top_logprobs"][0] == {"</s>": -0.5, "H": -1.0}


def test_echo_shows_a_text_prompt() -> None:
    answer = ok(post(FakeFrontend(), PATH, {"prompt": "né", "echo": True, "logprobs": 0, "max_tokens": 1}))
    choice = answer["choices"][0]
    assert choice["text"] == "néH"
    assert choice["logprobs"]["tokens"] == ["<s>", "n", "\ufffd", "\ufffd", "H"]
    assert choice["logprobs"]["text_offset"] == [0, 0, 1, 1, 2]
    assert choice["logprobs"]["token_logprobs"] == [None, -1.0, -1.0, -1.0, -1.0]
    assert choice["logprobs"]["top_logprobs"] == [
        None,
        {"n": -1.0},
        {"bytes:\\xc3": -1.0},
        {"bytes:\\xa9": -1.0},
        {"H": -1.0},
    ]


def test_echo_of_ids_shows_special_tokens() -> None:
    choice = ok(post(FakeFrontend(), PATH, {"prompt": [BOS, 97], "echo": True, "logprobs": 0}))["choices"][0]
    assert choice["text"] == "<s>aHi é0"
    assert choice["logprobs"]["text_offset"][:3] == [0, 3, 4]


def test_echo_without_logprobs() -> None:
    frontend = FakeFrontend()
    assert ok(post(frontend, PATH, {"prompt": "a", "echo": True}))["choices"][0]["text"] == "aHi é0"
    assert frontend.submits[0].params.prompt_logprobs is None
    assert _streamed(FakeFrontend(), {"prompt": "a", "echo": True})[0]["text"] == "aHi é0"


def test_scoring_a_prompt_alone() -> None:
    frontend = FakeFrontend()
    body = {"prompt": ["ab", "c"], "echo": True, "logprobs": 1, "max_tokens": 0, "min_tokens": 0}
    answer = ok(post(frontend, PATH, body))
    assert {one.params.max_tokens for one in frontend.submits} == {0}
    assert [choice["text"] for choice in answer["choices"]] == ["ab", "c"]
    assert [choice["logprobs"]["tokens"] for choice in answer["choices"]] == [["<s>", "a", "b"], ["<s>", "c"]]
    assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (5, 0)
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["length", "length"]
    assert _streamed(FakeFrontend(), body)[1]["text"] == "c"


def test_max_tokens_0_without_echo_is_an_empty_answer() -> None:
    answer = ok(post(FakeFrontend(), PATH, {"prompt": "ab", "max_tokens": 0}))
    assert (answer["choices"][0]["text"], answer["choices"][0]["finish_reason"]) == ("", "length")
    assert answer["usage"]["completion_tokens"] == 0


def test_each_prompt_may_have_its_adapter() -> None:
    frontend = FakeFrontend("pirate", "poet")
    ok(post(frontend, PATH, {"prompt": ["a", "b", "c"], "lora_path": ["pirate", None, {"poet": 0.5}]}))
    assert [one.lora for one in frontend.submits] == ["pirate", None, {"poet": 0.5}]
    ok(post(frontend, PATH, {"prompt": ["a", "b"], "model": "poet"}))
    assert [one.lora for one in frontend.submits[3:]] == ["poet", "poet"]


def test_special_tokens_can_be_left_out() -> None:
    frontend = FakeFrontend()
    ok(post(frontend, PATH, {"prompt": "a", "add_special_tokens": False}))
    assert frontend.streams[0].prompt_ids == [97]
    assert EOS not in frontend.streams[0].prompt_ids
