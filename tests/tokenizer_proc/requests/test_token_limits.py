"""Fields that limit the tokens of an output: what reaches the scheduler, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from fixtures.serving.api_calls import error, ok, post, stream
from fixtures.serving.scripted_scheduler import ScriptedScheduler

from engine.messages import Sampling

PATH, BODY = "/v1/completions", {"prompt": "a"}


def sent(fields: dict[str, Any]) -> Sampling:
    """Returns the sampling parameters that a body with `fields` sends to the scheduler."""
    scheduler = ScriptedScheduler("c")
    ok(post(scheduler.frontend(), PATH, BODY | fields))
    return scheduler.generates[0].sampling


def test_bad_words_are_sent_alone_and_after_a_space() -> None:
    assert sent({"bad_words": ["ab", "c"]}).bad_words == [[97, 98], [32, 97, 98], [99], [32, 99]]
    assert sent({"bad_words": "c"}).bad_words == [[99], [32, 99]]
    assert sent({"bad_words": [" c"]}).bad_words == [[32, 99]]


def test_allowed_tokens_are_sent_once_each() -> None:
    assert sent({"allowed_token_ids": [9, 5, 9]}).allowed_token_ids == [5, 9]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"allowed_token_ids": [258]}, "allowed_token_ids"),
        ({"allowed_token_ids": [-1]}, "allowed_token_ids"),
        ({"allowed_token_ids": [257], "min_tokens": 1}, "allowed_token_ids"),
        ({"allowed_token_ids": [99], "bad_words": ["c"]}, "allowed_token_ids"),
        ({"bad_words": [""]}, "bad_words[0]"),
        ({"bad_words": ["a", " "]}, "bad_words[1]"),
        ({"bad_words": ["x" * 65]}, "bad_words[0]"),
        ({"bad_words": ["x" * 1000]}, "bad_words[0]"),
        ({"bad_words": ["x"] * 129}, "bad_words"),
        ({"bad_words": ["x" * 100] * 100}, "bad_words"),
        ({"stop_regex": "("}, "stop_regex"),
        ({"stop_regex": ["a", "b*"]}, "stop_regex"),
    ],
)
def test_limits_that_cannot_be_kept_are_refused(fields: dict[str, Any], param: str) -> None:
    scheduler = ScriptedScheduler("c")
    assert error(post(scheduler.frontend(), PATH, BODY | fields))["param"] == param
    assert not scheduler.generates


@pytest.mark.parametrize(("path", "body"), [(PATH, BODY), ("/generate", {"text": "a"})])
def test_an_expression_ends_the_output_and_stays_in_it(path: str, body: dict[str, Any]) -> None:
    scheduler = ScriptedScheduler("one 12. two")
    fields = {"stop_regex": "[0-9]+\\."}
    body = body | ({"sampling_params": fields} if path == "/generate" else fields)
    answer = ok(post(scheduler.frontend(), path, body))
    shown = answer if path == "/generate" else answer["choices"][0]
    assert shown["text"] == "one 12."
    if path == "/generate":
        assert shown["meta_info"]["finish_reason"] == {"type": "stop", "matched": "[0-9]+\\."}
    assert len(scheduler.aborted) == 1


def test_held_text_is_sent_when_an_expression_matches() -> None:
    events = stream(ScriptedScheduler("so 12. two").frontend(), PATH, BODY | {"stop": "2. too", "stop_regex": "2\\."})
    assert "".join(event["choices"][0]["text"] for event in events[:-1]) == "so 12."


def test_an_expression_counts_after_min_tokens() -> None:
    body = BODY | {"stop_regex": "o", "min_tokens": 5}
    assert ok(post(ScriptedScheduler("one two").frontend(), PATH, body))["choices"][0]["text"] == "one two"
    assert ok(post(ScriptedScheduler("one twoo!").frontend(), PATH, body))["choices"][0]["text"] == "one two"


def test_asked_log_probabilities_stand_beside_the_others() -> None:
    scheduler = ScriptedScheduler("c")
    body = {"text": "ab", "return_logprob": True, "logprob_start_len": 0, "return_text_in_logprobs": True,
            "token_ids_logprob": [97, 65]}  # fmt: skip
    meta = ok(post(scheduler.frontend(), "/generate", body))["meta_info"]
    assert scheduler.generates[0].sampling.token_ids_logprob == [97, 65]
    assert meta["output_token_ids_logprobs"][0] == [[-3.0, 97, "a"], [-3.5, 65, "A"]]
    assert meta["input_token_ids_logprobs"] == [None] + [[[-3.0, 97, "a"], [-3.5, 65, "A"]]] * 2


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"token_ids_logprob": [1]}, "token_ids_logprob"),
        ({"token_ids_logprob": [258], "return_logprob": True}, "token_ids_logprob"),
        ({"token_ids_logprob": [1] * 65, "return_logprob": True}, "token_ids_logprob"),
        ({"token_ids_logprob": [[1], [2]], "return_logprob": True}, "token_ids_logprob"),
        ({"token_ids_logprob": [[1], 2], "return_logprob": True}, "token_ids_logprob"),
    ],
)
def test_asked_log_probabilities_that_cannot_be_told_are_refused(fields: dict[str, Any], param: str) -> None:
    assert error(post(ScriptedScheduler("c").frontend(), "/generate", {"text": "ab"} | fields))["param"] == param
