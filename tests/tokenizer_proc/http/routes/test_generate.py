"""/generate: responses in SGLang's format, for one prompt and for lists, streamed and not."""

from __future__ import annotations

from typing import Any

import pytest
from fixtures.serving.api_calls import error, ok, post, stream
from fixtures.serving.fake_frontend import EOS, FakeFrontend

PATH = "/generate"
SAID = [*"Hi é0".encode(), EOS]


def test_one_prompt_gives_one_object() -> None:
    frontend = FakeFrontend()
    answer = ok(post(frontend, PATH, {"text": "a", "rid": "r1"}))
    assert answer["text"] == "Hi é0"
    assert answer["output_ids"] == SAID
    meta = answer["meta_info"]
    assert meta.pop("e2e_latency") >= 0
    assert meta == {
        "id": "r1",
        "finish_reason": {"type": "stop", "matched": EOS},
        "prompt_tokens": 2,
        "completion_tokens": 7,
        "cached_tokens": 2,
    }
    assert frontend.submits[0].default_max_tokens == 128


def test_max_new_tokens_ends_with_finish_reason_length() -> None:
    answer = ok(post(FakeFrontend(), PATH, {"input_ids": [97], "sampling_params": {"max_new_tokens": 3}}))
    assert answer["meta_info"]["finish_reason"] == {"type": "length", "length": 3}
    assert answer["meta_info"]["prompt_tokens"] == 1


def test_a_list_in_is_a_list_out() -> None:
    assert [one["text"] for one in ok(post(FakeFrontend(), PATH, {"text": ["a"]}))] == ["Hi é0"]
    assert len(ok(post(FakeFrontend(), PATH, {"input_ids": [[1], [2, 3]]}))) == 2


def test_several_choices_are_a_list() -> None:
    answers = ok(post(FakeFrontend(), PATH, {"text": "a", "sampling_params": {"n": 2}}))
    assert [one["text"] for one in answers] == ["Hi é0", "Hi é1"]
    assert len({one["meta_info"]["id"] for one in answers}) == 2


def test_parameters_for_each_prompt() -> None:
    frontend = FakeFrontend()
    body = {"text": ["a", "b"], "sampling_params": [{"max_new_tokens": 1}, {"n": 2, "stop": "x"}], "rid": ["p", "q"]}
    answers = ok(post(frontend, PATH, body))
    assert [one["text"] for one in answers] == ["H", "Hi é0", "Hi é1"]
    assert [one["meta_info"]["id"] for one in answers] == ["p", "q", "q-1"]
    assert frontend.submits[1].params.stop == ["x"]


def test_two_lengths_that_agree() -> None:
    body = {"text": "a", "sampling_params": {"max_new_tokens": 3, "max_tokens": 3}}
    assert ok(post(FakeFrontend(), PATH, body))["text"] == "Hi "


@pytest.mark.parametrize(
    ("fields", "loras"),
    [
        ({}, [None, None]),
        ({"lora_path": None}, [None, None]),
        ({"lora_path": "pirate"}, ["pirate", "pirate"]),
        ({"lora_path": ["pirate", None]}, ["pirate", None]),
        ({"lora_path": [{"pirate": 0.5, "poet": 2}, "poet"]}, [{"pirate": 0.5, "poet": 2.0}, "poet"]),
        ({"sampling_params": {"lora_path": "poet"}}, ["poet", "poet"]),
        ({"sampling_params": {"lora_path": ["poet", None]}}, ["poet", None]),
        ({"sampling_params": [{"lora_path": "poet"}, {}]}, ["poet", None]),
        ({"sampling_params": {"lora_path": "poet"}, "lora_path": "poet"}, ["poet", "poet"]),
    ],
)
def test_adapters_are_named_by_lora_path(fields: dict[str, Any], loras: list[Any]) -> None:
    frontend = FakeFrontend("pirate", "poet")
    ok(post(frontend, PATH, {"text": ["a", "b"]} | fields))
    assert [one.lora for one in frontend.submits] == loras


def test_conflicting_adapters_are_both_named_in_the_error() -> None:
    body = {"text": "a", "lora_path": "poet", "sampling_params": {"lora_path": "pirate"}}
    found = error(post(FakeFrontend("pirate", "poet"), PATH, body))
    assert "poet" in found["message"]
    assert "pirate" in found["message"]


def test_unknown_adapter() -> None:
    assert "ghost" in error(post(FakeFrontend(), PATH, {"text": "a", "lora_path": "ghost"}), 404)["message"]
    assert error(post(FakeFrontend("p"), PATH, {"text": ["a"], "lora_path": ["p", None]}))["param"] == "lora_path"


def test_stream_events_are_cumulative() -> None:
    events = stream(FakeFrontend(), PATH, {"text": "a"})
    assert events.pop() == "[DONE]"
    assert [event["text"] for event in events] == ["H", "Hi", "Hi ", "Hi ", "Hi é", "Hi é0", "Hi é0"]
    assert [event["output_ids"] for event in events] == [SAID[: n + 1] for n in range(7)]
    assert [event["meta_info"]["finish_reason"] for event in events[:-1]] == [None] * 6
    assert events[-1]["meta_info"]["finish_reason"] == {"type": "stop", "matched": EOS}
    assert [event["meta_info"]["completion_tokens"] for event in events] == [1, 2, 3, 4, 5, 6, 7]
    assert all("index" not in event for event in events)


def test_stream_events_of_a_list_have_an_index() -> None:
    events = stream(FakeFrontend(), PATH, {"text": ["a", "b"], "sampling_params": {"n": 2}})[:-1]
    last = {event["index"]: event["text"] for event in events}
    assert last == {0: "Hi é0", 1: "Hi é1", 2: "Hi é0", 3: "Hi é1"}


def test_logprobs_are_triples() -> None:
    body = {"text": "ab", "return_logprob": True, "top_logprobs_num": 2, "sampling_params": {"max_new_tokens": 2}}
    meta = ok(post(FakeFrontend(), PATH, body))["meta_info"]
    assert meta["output_token_logprobs"] == [[-1.0, ord("H"), None], [-1.0, ord("i"), None]]
    assert meta["output_top_logprobs"] == [[[-0.5, EOS, None], [-1.5, EOS - 1, None]]] * 2
    assert meta["input_token_logprobs"] == []


def test_prompt_logprobs_may_carry_text() -> None:
    body = {"text": "ab", "return_logprob": True, "return_text_in_logprobs": True, "top_logprobs_num": 1}
    meta = ok(post(FakeFrontend(), PATH, body | {"logprob_start_len": 0}))["meta_info"]
    assert meta["input_token_logprobs"] == [[None, 256, "<s>"], [-1.0, 97, "a"], [-1.0, 98, "b"]]
    assert meta["input_top_logprobs"] == [None, [[-0.5, EOS, "</s>"]], [[-0.5, EOS, "</s>"]]]
    meta = ok(post(FakeFrontend(), PATH, body | {"logprob_start_len": 2}))["meta_info"]
    assert meta["input_token_logprobs"] == [[-1.0, 98, "b"]]


def test_logprobs_may_be_asked_for_some_prompts() -> None:
    answers = ok(post(FakeFrontend(), PATH, {"text": ["a", "b"], "return_logprob": [True, False]}))
    assert "output_token_logprobs" in answers[0]["meta_info"]
    assert "output_token_logprobs" not in answers[1]["meta_info"]
