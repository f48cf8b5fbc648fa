"""Validation: every error names its field, and valid values are resolved once."""

from __future__ import annotations

import math
from typing import Any

import pytest

from engine.errors import InvalidRequest
from engine.messages import SamplingParams
from tokenizer_proc.requests.validation import (
    MAX_COPIES,
    MAX_N,
    MAX_TOKEN_IDS,
    SEEDS,
    ValidatedParams,
    check_copies,
    validate_params,
)
from tokenizer_proc.text.generation_config import GenerationConfig


def validated(
    *,
    prompt: list[int] | None = None,
    default_max_tokens: int | None = None,
    generation_config: GenerationConfig | None = None,
    given_seed: int = 5,
    **fields: Any,
) -> ValidatedParams:
    return validate_params(
        SamplingParams(**fields),
        generation_config=generation_config or GenerationConfig(end_ids=[2]),
        seed=given_seed,
        prompt=[1, 2, 3] if prompt is None else prompt,
        max_length=32,
        vocab_size=100,
        default_max_tokens=default_max_tokens,
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 0),
        ("n", 129),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", 1e300),
        ("repetition_penalty", 1e300),
        ("repetition_penalty", 1e-300),
        ("top_p", -0.1),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("top_k", -2),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.nan),
        ("presence_penalty", 2.5),
        ("frequency_penalty", -2.5),
        ("logprobs", 21),
        ("logprobs", -1),
        ("prompt_logprobs", 21),
        ("logit_bias", {100: 1.0}),
        ("logit_bias", dict.fromkeys(range(MAX_TOKEN_IDS["logit_bias"] + 1), 1.0)),
        ("stop_token_ids", [1] * (MAX_TOKEN_IDS["stop_token_ids"] + 1)),
        ("allowed_token_ids", [1] * (MAX_TOKEN_IDS["allowed_token_ids"] + 1)),
        ("logit_bias", {1: 100.5}),
        ("logit_bias", {1: math.nan}),
        ("stop", [""]),
        ("stop", ["a"] * 17),
        ("stop", ["a" * 2000]),
        ("stop_token_ids", [100]),
        ("stop_token_ids", [-1]),
        ("max_tokens", -1),
        ("max_tokens", 30),
        ("min_tokens", -1),
        ("min_tokens", 30),
        ("seed", 1 << 64),
    ],
)
def test_out_of_range_names_the_field(field: str, value: object) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        validated(**{field: value})
    assert refusal.value.param == field


def test_bad_prompts_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="empty"):
        validated(prompt=[])
    with pytest.raises(InvalidRequest, match="token id 100 is not"):
        validated(prompt=[1, 100])
    with pytest.raises(InvalidRequest, match="-1"):
        validated(prompt=[-1])
    with pytest.raises(InvalidRequest, match=r"has 32 tokens; this model's context is 32") as refusal:
        validated(prompt=[1] * 32)
    assert refusal.value.code == "context_length_exceeded"


def test_max_tokens_fits_the_context() -> None:
    assert validated(max_tokens=29).stopping.max_tokens == 29
    with pytest.raises(InvalidRequest, match="32") as refusal:
        validated(max_tokens=30)
    assert refusal.value.code == "context_length_exceeded"
    assert validated(default_max_tokens=500).stopping.max_tokens == 29
    assert validated(default_max_tokens=16).stopping.max_tokens == 16
    assert validated().stopping.max_tokens == 29


def test_defaults_fill_missing_values_alone() -> None:
    generation_config = GenerationConfig(temperature=0.6, top_p=0.9, top_k=20, min_p=0.1, repetition_penalty=1.1)
    assert validated(generation_config=generation_config).sampling.temperature == 0.6
    asked = validated(
        generation_config=generation_config, temperature=0.0, top_p=1.0, top_k=-1, min_p=0.0, repetition_penalty=1.0
    ).sampling
    assert (asked.temperature, asked.top_p, asked.top_k, asked.min_p, asked.repetition_penalty) == (0, 1, 0, 0, 1)


def test_end_ids_are_the_models_and_the_clients() -> None:
    ends = GenerationConfig(end_ids=[2, 3, 1000])
    assert validated(generation_config=ends, stop_token_ids=[7, 2]).stopping.end_ids == [2, 3, 7]
    assert validated(generation_config=ends, stop_token_ids=[7], ignore_eos=True).stopping.end_ids == [7]
    passed = validated(generation_config=ends, min_tokens=4)
    assert passed.sampling.end_ids == passed.stopping.end_ids
    assert passed.sampling.min_tokens == passed.stopping.min_tokens == passed.text.min_tokens == 4


def test_every_choice_has_its_own_seed() -> None:
    assert [validated(n=3, seed=9).sampling_of(i).seed for i in range(3)] == [9, 10, 11]
    assert validated(n=2, given_seed=5).sampling_of(1).seed == 6
    assert validated(seed=-1).sampling_of(0).seed == SEEDS - 1
    last = validate_params(
        SamplingParams(n=2, seed=SEEDS - 1),
        generation_config=GenerationConfig(),
        seed=0,
        prompt=[1],
        max_length=8,
        vocab_size=9,
        default_max_tokens=None,
    )
    assert [last.sampling_of(i).seed for i in range(2)] == [SEEDS - 1, 0]


def test_the_prompt_is_scored_once() -> None:
    passed = validated(n=2, prompt_logprobs=0, logprobs=3)
    assert [passed.sampling_of(i).prompt_logprobs for i in range(2)] == [0, -1]
    assert passed.sampling_of(1).logprobs == 3
    assert validated().sampling.logprobs == -1


def test_a_top_k_beyond_the_vocabulary_keeps_all_tokens() -> None:
    """A body may hold any whole number; the sampler's table holds 64 bits."""
    assert validated(top_k=1 << 63).sampling.top_k == 100
    assert validated(top_k=7).sampling.top_k == 7


def test_biases_of_all_answers_are_bounded_together() -> None:
    params = SamplingParams(n=2, logit_bias=dict.fromkeys(range(1000), 1.0), stop_token_ids=[1] * 24)
    check_copies([params] * (MAX_COPIES // 2048))
    with pytest.raises(InvalidRequest, match=str(MAX_COPIES)):
        check_copies([params] * (MAX_COPIES // 2048 + 1))
    with pytest.raises(InvalidRequest, match="together"):
        validated(n=128, stop_token_ids=[1] * (MAX_COPIES // 128 + 1))


@pytest.mark.parametrize("n", [0, -1000, MAX_N + 1])
def test_an_n_out_of_range_is_refused_for_the_whole_call(n: int) -> None:
    large, wrong = SamplingParams(n=MAX_N, stop_token_ids=[1] * 2048), SamplingParams(n=n, stop_token_ids=[1] * 2048)
    with pytest.raises(InvalidRequest, match="n must be from 1") as raised:
        check_copies([large, large, wrong])
    assert raised.value.param == "n"
