"""The gate: every refusal names its field; what passes is resolved once."""

from __future__ import annotations

import math
from typing import Any

import pytest

from engine.errors import InvalidRequest
from engine.messages import SamplingParams
from tokenizer_proc.requests.validation import SEEDS, ValidatedParams, validate_params
from tokenizer_proc.text.generation_config import GenerationConfig


def gate(
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
        ("top_p", 0.0),
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
        ("logit_bias", {1: 100.5}),
        ("logit_bias", {1: math.nan}),
        ("stop", [""]),
        ("stop", ["a"] * 17),
        ("stop", ["a" * 2000]),
        ("stop_token_ids", [100]),
        ("stop_token_ids", [-1]),
        ("max_tokens", 0),
        ("max_tokens", 30),
        ("min_tokens", -1),
        ("min_tokens", 30),
        ("seed", 1 << 64),
    ],
)
def test_out_of_range_names_the_field(field: str, value: object) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        gate(**{field: value})
    assert refusal.value.param == field


def test_prompts() -> None:
    with pytest.raises(InvalidRequest, match="empty"):
        gate(prompt=[])
    with pytest.raises(InvalidRequest, match="token id 100 is not"):
        gate(prompt=[1, 100])
    with pytest.raises(InvalidRequest, match="-1"):
        gate(prompt=[-1])
    with pytest.raises(InvalidRequest, match=r"has 32 tokens; this model's context is 32") as refusal:
        gate(prompt=[1] * 32)
    assert refusal.value.code == "context_length_exceeded"


def test_lengths() -> None:
    assert gate(max_tokens=29).stopping.max_tokens == 29
    with pytest.raises(InvalidRequest, match="32") as refusal:
        gate(max_tokens=30)
    assert refusal.value.code == "context_length_exceeded"
    assert gate(default_max_tokens=500).stopping.max_tokens == 29
    assert gate(default_max_tokens=16).stopping.max_tokens == 16
    assert gate().stopping.max_tokens == 29


def test_defaults_fill_what_is_left_out_and_only_that() -> None:
    generation_config = GenerationConfig(temperature=0.6, top_p=0.9, top_k=20, min_p=0.1, repetition_penalty=1.1)
    assert gate(generation_config=generation_config).sampling.temperature == 0.6
    asked = gate(
        generation_config=generation_config, temperature=0.0, top_p=1.0, top_k=-1, min_p=0.0, repetition_penalty=1.0
    ).sampling
    assert (asked.temperature, asked.top_p, asked.top_k, asked.min_p, asked.repetition_penalty) == (0, 1, 0, 0, 1)


def test_end_ids() -> None:
    ends = GenerationConfig(end_ids=[2, 3, 1000])
    assert gate(generation_config=ends, stop_token_ids=[7, 2]).stopping.end_ids == [2, 3, 7]
    assert gate(generation_config=ends, stop_token_ids=[7], ignore_eos=True).stopping.end_ids == [7]
    passed = gate(generation_config=ends, min_tokens=4)
    assert passed.sampling.end_ids == passed.stopping.end_ids
    assert passed.sampling.min_tokens == passed.stopping.min_tokens == passed.text.min_tokens == 4


def test_every_choice_has_its_seed() -> None:
    assert [gate(n=3, seed=9).sampling_of(i).seed for i in range(3)] == [9, 10, 11]
    assert gate(n=2, given_seed=5).sampling_of(1).seed == 6
    assert gate(seed=-1).sampling_of(0).seed == SEEDS - 1
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
    passed = gate(n=2, prompt_logprobs=0, logprobs=3)
    assert [passed.sampling_of(i).prompt_logprobs for i in range(2)] == [0, -1]
    assert passed.sampling_of(1).logprobs == 3
    assert gate().sampling.logprobs == -1


def test_a_top_k_beyond_the_vocabulary_means_all_of_it() -> None:
    """Any whole number may come in a body; the sampler's table holds 64 bits."""
    assert gate(top_k=1 << 63).sampling.top_k == 100
    assert gate(top_k=7).sampling.top_k == 7
