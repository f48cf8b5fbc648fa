"""The fields of vLLM's and SGLang's bodies that OpenAI's lack, in the calls of OpenAI's dialect."""

from __future__ import annotations

from typing import Any

import pytest
from fixtures.serving.api_calls import error, ok, post, stream
from fixtures.serving.fake_frontend import BOS, FakeFrontend
from fixtures.serving.scripted_scheduler import ScriptedScheduler

CHAT = ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]})
COMPLETION = ("/v1/completions", {"prompt": "a"})
OPENAI = [CHAT, COMPLETION]
USAGE = {"include_usage": True, "continuous_usage_stats": True}


@pytest.mark.parametrize(("path", "body"), OPENAI)
def test_continuous_usage_counts_in_each_event(path: str, body: dict[str, Any]) -> None:
    events = stream(FakeFrontend(), path, body | {"stream_options": USAGE, "n": 2})[:-1]
    for index in (0, 1):
        own = [event for event in events[:-1] if event["choices"][0]["index"] == index]
        counts = [event["usage"]["completion_tokens"] for event in own]
        assert counts == sorted(counts)
        assert set(range(1, 8)) <= set(counts)
        assert counts[0] == (0 if path == CHAT[0] else 1), "the event with the role has no token"
        assert all(event["usage"]["total_tokens"] == event["usage"]["prompt_tokens"] + count
                   for event, count in zip(own, counts, strict=True))  # fmt: skip
    assert events[-1]["usage"]["completion_tokens"] == 14


@pytest.mark.parametrize(("path", "body"), OPENAI)
def test_continuous_usage_needs_include_usage(path: str, body: dict[str, Any]) -> None:
    events = stream(FakeFrontend(), path, body | {"stream_options": {"continuous_usage_stats": True}})[:-1]
    assert not any("usage" in event for event in events)


@pytest.mark.parametrize(("path", "body"), OPENAI)
def test_each_token_has_an_event_even_without_text(path: str, body: dict[str, Any]) -> None:
    """The first byte of é and the end token show no text."""
    events = stream(FakeFrontend(), path, body)[:-1]
    with_tokens = [event for event in events if event["choices"][0].get("delta", {}).get("role") is None]
    assert len(with_tokens) == len("Hi é0".encode()) + 1


@pytest.mark.parametrize(("path", "body"), OPENAI)
def test_token_ids_are_returned(path: str, body: dict[str, Any]) -> None:
    output = [*"Hi é0".encode(), 257]
    answer = ok(post(FakeFrontend(), path, body | {"return_token_ids": True}))
    assert answer["choices"][0]["token_ids"] == output
    events = stream(FakeFrontend(), path, body | {"return_token_ids": True})[:-1]
    assert [token for event in events for token in event["choices"][0].get("token_ids", [])] == output
    prompts = [holder["prompt_token_ids"] for event in [answer, *events] for holder in [event, *event["choices"]]
               if "prompt_token_ids" in holder]  # fmt: skip
    expected = [BOS, ord("a")] if path == COMPLETION[0] else [*b"user: a\nassistant:"]
    assert prompts == [expected, expected]


@pytest.mark.parametrize(("path", "body"), OPENAI)
def test_token_ids_are_not_returned_unasked(path: str, body: dict[str, Any]) -> None:
    answer = ok(post(FakeFrontend(), path, body | {"return_token_ids": False}))
    assert "prompt_token_ids" not in answer
    assert not {"token_ids", "prompt_token_ids"} & set(answer["choices"][0])


def test_tokens_are_named_by_id() -> None:
    fields = {"return_tokens_as_token_ids": True}
    chat = ok(post(FakeFrontend(), CHAT[0], CHAT[1] | fields | {"logprobs": True, "top_logprobs": 1}))
    first = chat["choices"][0]["logprobs"]["content"][0]
    assert (first["token"], first["bytes"], first["top_logprobs"][0]["token"]) == ("token_id:72", [72], "token_id:257")
    body = COMPLETION[1] | fields | {"logprobs": 1, "echo": True}
    shown = ok(post(FakeFrontend(), COMPLETION[0], body))["choices"][0]["logprobs"]
    assert shown["tokens"][:3] == [f"token_id:{BOS}", "token_id:97", "token_id:72"]
    assert set(shown["top_logprobs"][2]) == {"token_id:257", "token_id:72"}


def test_prompt_logprobs_have_vllms_shape() -> None:
    answer = ok(
        post(FakeFrontend(), COMPLETION[0], COMPLETION[1] | {"prompt_logprobs": 2, "logprobs": 0, "echo": True})
    )
    [choice] = answer["choices"]
    assert choice["prompt_logprobs"] == [
        None,
        {
            "97": {"logprob": -1.0, "rank": None, "decoded_token": "a"},
            "257": {"logprob": -0.5, "rank": 1, "decoded_token": "</s>"},
            "256": {"logprob": -1.5, "rank": 2, "decoded_token": "<s>"},
        },
    ]
    assert choice["logprobs"]["top_logprobs"][1] == {"a": -1.0}, "the echo has the best tokens of logprobs alone"
    chat = ok(post(FakeFrontend(), CHAT[0], CHAT[1] | {"prompt_logprobs": 0}))
    assert [None if one is None else len(one) for one in chat["prompt_logprobs"]] == [None] + [1] * 17


@pytest.mark.parametrize(("path", "body"), OPENAI)
def test_prompt_logprobs_are_not_streamed(path: str, body: dict[str, Any]) -> None:
    assert (
        error(post(FakeFrontend(), path, body | {"prompt_logprobs": 1, "stream": True}))["param"] == "prompt_logprobs"
    )
    assert error(post(FakeFrontend(), path, body | {"prompt_logprobs": 99}))["param"] == "prompt_logprobs"


@pytest.mark.parametrize(("path", "body"), OPENAI)
def test_the_clients_id_names_the_answer(path: str, body: dict[str, Any]) -> None:
    assert ok(post(FakeFrontend(), path, body | {"request_id": "mine"}))["id"].endswith("-mine")
    assert ok(post(FakeFrontend(), path, body | {"rid": "mine"}))["id"] == "mine"
    assert error(post(FakeFrontend(), path, body | {"rid": "x" * 300}))["param"] == "rid"


@pytest.mark.parametrize(("path", "body"), [*OPENAI, ("/generate", {"text": "a"})])
def test_a_salt_separates_prefixes_within_the_tenant(path: str, body: dict[str, Any]) -> None:
    scheduler = ScriptedScheduler("c")
    front = scheduler.frontend()
    for salt in ("", "one", "two", "one"):
        ok(post(front, path, body | {"cache_salt": salt}))
    plain, one, two, again = [generate.cache_salt for generate in scheduler.generates]
    assert (plain, one) == ("", again)
    assert len({plain, one, two}) == 3
    assert {generate.tenant for generate in scheduler.generates} == {""}


def test_a_long_prompt_is_truncated_to_its_end() -> None:
    scheduler = ScriptedScheduler("c")
    front = scheduler.frontend()
    long = "x" * 600 + "yz"
    body = {"prompt": long, "truncate_prompt_tokens": 3, "max_tokens": 1, "echo": True}
    assert ok(post(front, COMPLETION[0], body))["choices"][0]["text"] == "xyzc"
    ok(post(front, COMPLETION[0], {"prompt": [*b"abcd"], "truncate_prompt_tokens": 2}))
    ok(post(front, COMPLETION[0], {"prompt": long, "truncate_prompt_tokens": -1, "max_tokens": 10}))
    turns = [{"role": "user", "content": long}]
    ok(post(front, CHAT[0], {"messages": turns, "truncate_prompt_tokens": 4, "max_tokens": 1}))
    assert [generate.prompt for generate in scheduler.generates] == [
        [*b"xyz"], [*b"cd"], [*(b"x" * 500 + b"yz")], [*b"ant:"]
    ]  # fmt: skip
    for bad in (-2, 512):
        found = error(post(front, COMPLETION[0], COMPLETION[1] | {"truncate_prompt_tokens": bad}))
        assert found["param"] == "truncate_prompt_tokens"


def test_a_prompt_shorter_than_the_truncation_is_whole() -> None:
    scheduler = ScriptedScheduler("c")
    ok(post(scheduler.frontend(), COMPLETION[0], COMPLETION[1] | {"truncate_prompt_tokens": 100}))
    assert scheduler.generates[0].prompt == [BOS, 97]


def test_tokenize_returns_the_vocabularys_own_texts() -> None:
    body = {"prompt": "a b", "add_special_tokens": False}
    assert ok(post(FakeFrontend(), "/tokenize", body | {"return_token_strs": True}))["token_strs"] == ["a", "Ġ", "b"]
    assert "token_strs" not in ok(post(FakeFrontend(), "/tokenize", body))
