"""A field that asks for nothing (false, 0, null or empty) never makes a body refused that is served without it."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
from fixtures.serving.api_calls import error, ok, post
from fixtures.serving.calls_without_sockets import Caller
from fixtures.serving.fake_frontend import FakeFrontend

from engine.messages import SamplingParams
from tokenizer_proc.http.bodies import decoding, fields
from tokenizer_proc.http.bodies.chat_messages import Turn
from tokenizer_proc.http.bodies.neutral import asking, struct_type
from tokenizer_proc.http.dialects.openai import StreamOptions
from tokenizer_proc.http.routes.chat import ChatBody
from tokenizer_proc.http.routes.completions import CompletionBody
from tokenizer_proc.http.routes.generate import GenerateBody
from tokenizer_proc.http.routes.lora import V1UnloadBody
from tokenizer_proc.http.routes.tokenize import DetokenizeBody, TokenizeBody

CASES = 10_000
NOTHING: tuple[Any, ...] = (False, 0, 0.0, None, "", [], {})
SAMPLING = {
    "max_tokens": 3, "min_tokens": 1, "n": 2, "temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 3,
    "repetition_penalty": 1.1, "presence_penalty": 0.5, "logit_bias": {"5": -3.5}, "stop": ["!"], "stop_token_ids": [7],
}  # fmt: skip
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Hi"}], "name": "me"},
]
CHAT: dict[str, Any] = {"messages": TURNS, "logprobs": True, **SAMPLING}
NATIVE = {"max_new_tokens": 3, **{name: value for name, value in SAMPLING.items() if name != "max_tokens"}}
ANYWHERE = {
    *fields.REASONS, *fields.NEUTRAL, *fields.IGNORED, *fields.SPELLINGS_OPENAI, *fields.SPELLINGS_NATIVE,
    *ChatBody.__struct_fields__, *CompletionBody.__struct_fields__, *GenerateBody.__struct_fields__,
    *TokenizeBody.__struct_fields__, *DetokenizeBody.__struct_fields__, *Turn.__struct_fields__,
    *StreamOptions.__struct_fields__, "thinking", "vllm_xargs", "no such field",
}  # fmt: skip
NAMES = sorted(ANYWHERE)
BODIES: list[tuple[str, dict[str, Any], set[str]]] = [  # the path, a body, and the fields that it is about
    ("/v1/chat/completions", CHAT, {"messages"}),
    ("/v1/chat/completions", {"messages": TURNS, "stream_options": {}}, {"messages"}),
    ("/v1/completions", {"prompt": ["a", "b"], "logprobs": 1, "echo": True, **SAMPLING}, {"prompt"}),
    ("/v1/completions", {"prompt": "a", "lora_path": None}, {"prompt"}),
    ("/generate", {"text": ["a", "b"], "sampling_params": NATIVE, "rid": ["x", "y"]}, {"text"}),
    ("/generate", {"input_ids": [1, 2], "return_logprob": True, "logprob_start_len": 0}, {"input_ids"}),
    ("/tokenize", {"messages": TURNS}, {"messages"}),
    ("/tokenize", {"prompt": "hello"}, {"prompt"}),
    ("/detokenize", {"tokens": [1, 2]}, {"tokens"}),
]


def places(path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the objects of a body in which fields are looked for: itself, and those inside it."""
    found = [body]
    for name in ("sampling_params", "stream_options"):
        found += [body[name]] if name in body else []
    for turn in body.get("messages") or []:
        found += [turn, *(turn["content"] if isinstance(turn["content"], list) else [])]
    return [place for place in found if isinstance(place, dict)]


def changed(draw: random.Random) -> tuple[str, dict[str, Any], list[tuple[str, Any]]]:
    """Returns a path, its body with one to three more fields that ask for nothing, and these fields."""
    path, sound, about = draw.choice(BODIES)
    body = {name: copied(value) for name, value in sound.items()}
    added = []
    for _ in range(draw.randint(1, 3)):
        place = draw.choice(places(path, body))
        name, value = draw.choice(NAMES), copied(draw.choice(NOTHING))
        if name in about | {"role", "type", "content", "text", "logprobs"} and name in place:
            continue
        place[name] = value
        added.append((name, value))
    return path, body, added


def copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: copied(each) for name, each in value.items()}
    return [copied(each) for each in value] if isinstance(value, list) else value


def test_fields_that_ask_for_nothing_never_refuse_a_body() -> None:
    caller, draw = Caller(FakeFrontend()), random.Random(17)

    async def run() -> None:
        for path, body, _ in BODIES:
            assert await caller.post(path, body) is None
        for _ in range(CASES):
            path, body, added = changed(draw)
            refusal = await caller.post(path, body)
            assert refusal is None, f"{path}, with {added}: {refusal.message}"

    asyncio.run(run())


@pytest.mark.parametrize("value", [1, "x", [1], {"a": 1}, True], ids=str)
def test_an_unknown_field_that_asks_is_refused(value: Any) -> None:
    for path, body, _ in BODIES:
        assert error(post(FakeFrontend(), path, body | {"no such field": value}))["param"] == "no such field"


def sent(body: dict[str, Any], path: str = "/v1/completions") -> SamplingParams:
    """Returns the parameters with which a body is submitted."""
    frontend = FakeFrontend()
    ok(post(frontend, path, {"prompt": "a"} | body))
    return frontend.submits[0].params


def test_zero_and_false_keep_their_meaning_where_they_have_one() -> None:
    params = sent({"temperature": 0, "top_p": 0, "seed": 0, "logprobs": 0, "skip_special_tokens": False})
    assert (params.temperature, params.top_p, params.seed, params.logprobs) == (0, 0, 0, 0)
    assert not params.skip_special_tokens
    assert not sent({"skip_special_tokens": 0}).skip_special_tokens


def test_zero_is_the_default_where_it_has_no_meaning() -> None:
    assert sent({"n": 0, "repetition_penalty": 0, "temperature": False, "stop": "", "logprobs": False}) == sent({})


def test_an_adapters_number_0_is_no_adapters_number() -> None:
    assert decoding.decode({"lora_name": "a", "lora_int_id": 0}, V1UnloadBody).lora_int_id is None


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"max_tokens": 5, "max_completion_tokens": 6}, 6),
        ({"max_tokens": 5, "max_completion_tokens": 0}, 5),
        ({"max_tokens": 0, "max_completion_tokens": 6}, 6),
        ({"max_completion_tokens": 6}, 6),
    ],
)
def test_max_completion_tokens_counts_before_max_tokens(body: dict[str, int], expected: int) -> None:
    assert sent(body).max_tokens == expected


@pytest.mark.parametrize(
    ("path", "body", "near"),
    [
        ("/v1/chat/completions", {"messages": TURNS, "temprature": 1}, "temperature"),
        ("/v1/completions", {"prompt": "a", "lora_paths": "x"}, "lora_path"),
        ("/generate", {"text": "a", "sampling_param": {"n": 1}}, "sampling_params"),
        ("/generate", {"text": "a", "sampling_params": {"max_new_token": 1}}, "max_new_tokens"),
        ("/v1/chat/completions", {"messages": [TURNS[0] | {"nmae": "x"}]}, "name"),
        ("/tokenize", {"promt": "a"}, "prompt"),
    ],
)
def test_the_refusal_of_an_unknown_field_names_the_nearest(path: str, body: dict[str, Any], near: str) -> None:
    assert error(post(FakeFrontend(), path, body))["message"].endswith(f"did you mean '{near}'?")


def test_the_refusal_of_a_long_field_name_is_short() -> None:
    found = error(post(FakeFrontend(), "/v1/completions", {"prompt": "a", "x" * 100_000: 1}))
    assert len(found["message"]) < 200


@pytest.mark.parametrize(
    ("body", "fields"),
    [
        (DetokenizeBody, {"tokens": [7] * 9}),
        (GenerateBody, {"input_ids": [[7], [8]]}),
        (CompletionBody, {"stop": ["a"]}),
    ],
)
def test_lists_without_objects_are_not_walked_through(body: type[Any], fields: dict[str, Any]) -> None:
    """Such a list may have a million items, and a copy in Python would stall the event loop."""
    names = {name: name for name in body.__struct_fields__}
    kept = asking(fields, struct_type(body), names)
    assert all(kept[name] is value for name, value in fields.items())
