"""Every family's tokens and logits against transformers, in float32: single, batched, chunked, with any page size."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fixtures.models.drive import Driver, Row
from fixtures.models.oracle import Oracle
from fixtures.models.tiny_models import FAMILIES, VOCAB, build

from model_runner.config import read_model_config
from model_runner.model.decoders.decoder import Decoder
from model_runner.model.load import load_model

N = 12
LENGTHS = (1, 2, 7, 16, 33, 50)

TinyModel = Callable[[str], Path]


def load(path: Path, dtype: torch.dtype = torch.float32, device: str = "cpu", length: int = 512) -> Decoder:
    return load_model(path, read_model_config(path).serving(length), device=torch.device(device), dtype=dtype)


def draw_ids(seed: int, length: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(VOCAB) for _ in range(length)]


def draw_prompts(oracle: Oracle, lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    """Returns one prompt of each length whose greedy tokens are unambiguous."""
    draw, prompts = random.Random(7), []
    for length in lengths:
        prompt = [draw.randrange(VOCAB) for _ in range(length)]
        while not oracle.is_unambiguous(prompt, N):
            prompt = [draw.randrange(VOCAB) for _ in range(length)]
        prompts.append(prompt)
    return prompts


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_equal_transformers(family: str, tiny_model: TinyModel) -> None:
    path = tiny_model(family)
    oracle, decoder = Oracle(path), load(path)
    prompts = draw_prompts(oracle)
    expected = [oracle.greedy(prompt, N) for prompt in prompts]
    assert len({tuple(tokens) for tokens in expected}) == len(expected), "a degenerate fixture"
    for page_size in (1, 4, 16):
        assert [Driver(decoder, page_size=page_size).greedy([p], N)[0] for p in prompts] == expected
        for chunk, late in ((10**6, 0), (5, 0), (7, 3), (1, 1)):
            assert Driver(decoder, page_size=page_size).greedy(prompts, N, chunk=chunk, late=late) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(family: str, tiny_model: TinyModel) -> None:
    path = tiny_model(family)
    ids = draw_ids(3, 150)
    ours = Driver(load(path)).step([(Row(ids), len(ids))])
    torch.testing.assert_close(ours, Oracle(path).logits(ids), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama3", "mistral", "qwen2", "qwen3", "gemma3", "olmo2", "phi3"])
def test_half_precision_logits_stay_near_transformers(family: str, dtype: torch.dtype, tiny_model: TinyModel) -> None:
    path = tiny_model(family)
    oracle = Oracle(path)
    ids = draw_ids(4, 40)
    ours = Driver(load(path, dtype)).step([(Row(ids), len(ids))]).log_softmax(-1)
    assert ours.dtype == torch.float32
    tolerance = 0.1 if dtype == torch.bfloat16 else 0.02
    assert (ours.exp() - oracle.logprobs(ids).exp()).abs().mean(0).max() < tolerance


def test_rows_do_not_depend_on_the_rest_of_the_batch(tiny_model: TinyModel) -> None:
    decoder = load(tiny_model("llama3"))
    draw = random.Random(5)
    ids = [draw.randrange(VOCAB) for _ in range(40)]
    alone = Driver(decoder)
    row = Row(list(ids))
    expected = torch.cat([alone.step([(row, 39)]), alone.step([(row, 1)])])
    crowd = Driver(decoder)
    row, others = Row(list(ids)), [Row([draw.randrange(VOCAB) for _ in range(90)]) for _ in range(5)]
    first = crowd.step([*((other, 20 + i) for i, other in enumerate(others)), (row, 39)])[-39:]
    second = crowd.step([(row, 1), *((other, 1 + i % 2) for i, other in enumerate(others))])[:1]
    torch.testing.assert_close(torch.cat([first, second]), expected, atol=1e-4, rtol=1e-5)


def test_longrope_factors_follow_the_context_length(tmp_path: Path) -> None:
    path = build("phi3-longrope", tmp_path, original_max_position_embeddings=24)
    oracle = Oracle(path)
    short = draw_prompts(oracle, (1, 5, 12))
    assert Driver(load(path, length=24)).greedy(short, N) == [oracle.greedy(prompt, N) for prompt in short]
    long = draw_prompts(
        oracle, (25, 40, 80)
    )  # longer than the original length, so that transformers takes the long factors from the first token on
    assert Driver(load(path)).greedy(long, N, chunk=7) == [oracle.greedy(prompt, N) for prompt in long]
    beyond = Driver(load(path, length=24)).step([(Row(long[0]), len(long[0]))])
    assert (beyond - oracle.logits(long[0])).abs().max() > 0.1, "the factors do not differ"


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_on_cuda_equal_transformers(family: str, tiny_model: TinyModel) -> None:
    path = tiny_model(family)
    oracle, decoder = Oracle(path), load(path, device="cuda")
    prompts = draw_prompts(oracle)
    ours = Driver(decoder, device="cuda").greedy(prompts, N, chunk=7)
    assert ours == [oracle.greedy(prompt, N) for prompt in prompts]
