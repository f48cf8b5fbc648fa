"""Draws against splitmix64 in Python integers, and against the probabilities of the distribution."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from model_runner.compute.sampler.draws import GOLDEN, MIX_1, MIX_2, as_int64, inverse_cdf, uniforms

WORD = (1 << 64) - 1
seeds = st.integers(-(1 << 63), (1 << 64) - 1)


def mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * MIX_1) & WORD
    x = ((x ^ (x >> 27)) * MIX_2) & WORD
    return x ^ (x >> 31)


def uniform(seed: int, position: int) -> float:
    inner = mix((seed + GOLDEN) & WORD)
    return (mix((inner + (position + 1) * GOLDEN) & WORD) >> 11) / 2**53


def test_finaliser_is_that_of_splitmix64() -> None:
    # published with the generator: the first outputs of splitmix64 from state 0
    assert mix(GOLDEN) == 0xE220A8397B1DCDAF
    assert mix(2 * GOLDEN & WORD) == 0x6E789E6AA1B965F4


@given(st.lists(st.tuples(seeds, st.integers(0, 1 << 20)), min_size=1, max_size=20))
def test_uniforms_equal_python_integers(cases: list[tuple[int, int]]) -> None:
    got = uniforms(torch.tensor([as_int64(s) for s, _ in cases]), torch.tensor([p for _, p in cases]))
    assert got.tolist() == [uniform(seed, position) for seed, position in cases]
    assert all(0.0 <= u < 1.0 for u in got.tolist())


def test_uniforms_are_uniform_over_positions_and_seeds() -> None:
    n = 20_000
    for u in (
        uniforms(torch.full((n,), 7), torch.arange(n)),
        uniforms(torch.arange(n), torch.full((n,), 11)),
    ):
        assert abs(float(u.mean()) - 0.5) < 0.01
        counts = torch.histc(u.float(), bins=20, min=0.0, max=1.0)
        assert float(((counts - n / 20) ** 2 / (n / 20)).sum()) < 50  # chi squared, 19 degrees of freedom
        assert abs(float(torch.corrcoef(torch.stack([u[1:], u[:-1]]))[0, 1])) < 0.03


def test_inverse_cdf_walks_tokens_in_id_order() -> None:
    logits = torch.log(torch.tensor([[0.25, 0.5, 0.25]])).repeat(5, 1)
    u = torch.tensor([0.0, 0.2499, 0.2501, 0.7499, 0.7501], dtype=torch.float64)
    assert inverse_cdf(logits, u).tolist() == [0, 0, 1, 1, 2]


def test_inverse_cdf_never_draws_a_masked_token() -> None:
    logits = torch.tensor([[float("-inf"), 0.0, float("-inf"), 1.0, float("-inf")]]).repeat(3, 1)
    u = torch.tensor([0.0, 0.5, 1.0 - 2.0**-53], dtype=torch.float64)
    assert inverse_cdf(logits, u).tolist() == [1, 3, 3]


def test_draws_follow_the_distribution() -> None:
    n, vocab = 40_000, 12
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(1))
    drawn = inverse_cdf(logits.expand(n, -1), uniforms(torch.full((n,), 3), torch.arange(n)))
    expected = torch.softmax(logits.double(), -1) * n
    seen = torch.bincount(drawn, minlength=vocab)
    assert float(((seen - expected) ** 2 / expected).sum()) < 40  # chi squared, 11 degrees of freedom


def test_row_with_nan_does_not_change_other_rows() -> None:
    logits = torch.zeros(3, 4)
    logits[1] = float("nan")
    drawn = inverse_cdf(logits, torch.tensor([0.3, 0.3, 0.9], dtype=torch.float64)).tolist()
    assert (drawn[0], drawn[2]) == (1, 3)
    assert 0 <= drawn[1] < 4


def test_blocks_of_a_large_vocabulary_change_no_token() -> None:
    logits = torch.randn(6, 1003, generator=torch.Generator().manual_seed(3)) * 5
    logits[:, 200:700] = float("-inf")
    u = torch.rand(2000, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    for row in logits:
        edges = torch.softmax(row.double(), -1).cumsum(-1)
        clear = (edges[None] - u[:, None]).abs().amin(-1) > 1e-6
        drawn = inverse_cdf(row.expand(len(u), -1), u)
        assert clear.sum() > 1000
        assert torch.equal(drawn[clear], torch.searchsorted(edges, u, right=True)[clear])
