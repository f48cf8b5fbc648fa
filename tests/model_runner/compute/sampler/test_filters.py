"""Filters against a reference that sorts in Python, and against transformers' logits warpers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model_runner.compute.sampler import filters


def reference(logits: list[float], top_k: int, top_p: float, min_p: float) -> list[bool]:
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    if top_k:
        order = order[:top_k]
    weight = {token: math.exp(logits[token] - logits[order[0]]) for token in order}
    total, mass, kept = sum(weight.values()), 0.0, []
    for token in order:
        if kept and mass >= top_p * total and top_p < 1.0:
            break
        kept.append(token)
        mass += weight[token]
    allowed = {token for token in kept if weight[token] >= min_p}
    return [token in allowed for token in range(len(logits))]


def keep(logits: torch.Tensor, rows: list[tuple[int, float, float]]) -> torch.Tensor:
    ks, ps, ms = zip(*rows, strict=True)
    return filters.keep(logits, np.array(ks, np.int64), np.array(ps, np.float64), np.array(ms, np.float64))


row_filters = st.tuples(
    st.sampled_from([0, 1, 2, 5, 30, 64, 100]),
    st.sampled_from([1.0, 0.9, 0.5, 0.1, 0.001]),
    st.sampled_from([0.0, 0.05, 0.5, 1.0]),
)


@given(st.lists(row_filters, min_size=1, max_size=6), st.integers(0, 1000), st.sampled_from([(2, 20), (), (200,)]))
def test_keep_equals_the_sorting_reference(
    rows: list[tuple[int, float, float]], seed: int, candidates: tuple[int, ...]
) -> None:
    before, filters.CANDIDATES = filters.CANDIDATES, candidates
    try:
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(len(rows), 64, generator=generator) * 3
        if seed % 3 == 0:
            logits = logits.round()  # many equal logits: id order decides
        kept = keep(logits, rows)
    finally:
        filters.CANDIDATES = before
    for index, row in enumerate(rows):
        assert kept[index].tolist() == reference(logits[index].tolist(), *row)


@pytest.mark.parametrize("seed", range(3))
def test_keep_equals_the_warpers_of_transformers(seed: int) -> None:
    from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(40, 3000, generator=torch.Generator().manual_seed(seed)) * 4
    rng = np.random.default_rng(seed)
    rows = [
        (int(rng.choice([0, 5, 50, 1500])), float(rng.choice([1.0, 0.95, 0.6])), float(rng.choice([0.0, 0.02, 0.3])))
        for _ in range(len(logits))
    ]
    kept = keep(logits, rows)
    for index, (top_k, top_p, min_p) in enumerate(rows):
        scores = logits[index : index + 1]
        if top_k:
            scores = TopKLogitsWarper(top_k)(None, scores)
        if top_p < 1.0:
            scores = TopPLogitsWarper(top_p)(None, scores)
        if min_p > 0.0:
            scores = MinPLogitsWarper(min_p)(None, scores)
        assert torch.equal(kept[index], scores[0] > float("-inf"))


def test_flat_row_needs_more_than_the_candidates() -> None:
    logits = torch.zeros(2, 5000)
    logits[0, 7] = 50.0
    kept = keep(logits, [(0, 0.9, 0.0), (0, 0.9, 0.0)])
    assert kept[0].nonzero().tolist() == [[7]]
    assert kept[1].sum() == 4500
    assert bool(kept[1, :4500].all())


def test_top_k_one_keeps_the_lowest_of_equal_tokens() -> None:
    assert keep(torch.tensor([[1.0, 3.0, 3.0, 0.0]]), [(1, 1.0, 0.0)]).tolist() == [[False, True, False, False]]


def test_masked_tokens_are_not_kept() -> None:
    logits = torch.tensor([[0.0, float("-inf"), 1.0, float("-inf")]])
    kept = keep(logits, [(0, 0.99999, 0.0)])
    assert not kept[0, 1]
    assert not kept[0, 3]
