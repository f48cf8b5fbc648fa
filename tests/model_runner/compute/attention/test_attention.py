"""The torch attention backend against a slow reference, which computes one token at a time."""

from __future__ import annotations

import pytest
import torch
from fixtures.models.attention_cases import Case
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import ConfigError
from model_runner.compute.attention.base import create, resolve
from model_runner.compute.attention.torch_backend import TorchAttention

CPU = torch.device("cpu")

CHUNKS = st.lists(st.tuples(st.integers(0, 90), st.integers(1, 9) | st.just(1)), min_size=1, max_size=7)


@given(
    chunks=CHUNKS,
    page_size=st.sampled_from([1, 3, 16]),
    heads=st.sampled_from([(4, 4), (4, 2), (6, 1)]),
    window=st.none() | st.integers(1, 40),
    softcap=st.none() | st.sampled_from([0.5, 5.0]),
    seed=st.integers(0, 99),
)
def test_torch_attention_equals_the_reference(
    chunks: list[tuple[int, int]],
    page_size: int,
    heads: tuple[int, int],
    window: int | None,
    softcap: float | None,
    seed: int,
) -> None:
    case = Case(chunks, page_size, *heads, seed)
    out = case.run(create("torch", CPU), window=window, softcap=softcap)
    torch.testing.assert_close(out, case.reference(window, softcap), atol=1e-5, rtol=1e-5)


def test_layers_of_different_windows_share_one_plan() -> None:
    case = Case([(40, 1), (0, 30), (12, 5)], 4, 4, 2, 0)
    backend = TorchAttention(CPU)
    meta = backend.plan(case.layout)
    for window in (None, 7, None, 16, 7):
        out = case.run(backend, meta, window=window)
        torch.testing.assert_close(out, case.reference(window), atol=1e-5, rtol=1e-5)


def test_keys_and_values_are_stored_at_their_slots() -> None:
    case = Case([(5, 3), (2, 1)], 4, 4, 2, 1)
    before = case.k_cache.clone()
    case.run(TorchAttention(CPU))
    slots = case.layout.slots().tolist()
    flat = case.k_cache.flatten(0, 1)
    assert torch.equal(flat[slots], case.k)
    assert torch.equal(case.v_cache.flatten(0, 1)[slots], case.v)
    others = [slot for slot in range(len(flat)) if slot not in slots]
    torch.testing.assert_close(flat[others], before.flatten(0, 1)[others], equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("window", [None, 10])
@pytest.mark.parametrize("chunks", [[(30, 1), (70, 1), (3, 1)], [(30, 1), (20, 6), (0, 8), (9, 1)]])
def test_nan_in_one_row_leaves_the_others_bit_equal(
    chunks: list[tuple[int, int]], window: int | None, softcap: float | None
) -> None:
    backend = TorchAttention(CPU)
    for chunk in range(len(chunks)):
        clean, dirty = (Case(chunks, 4, 4, 2, 3) for _ in range(2))
        dirty.poison(chunk)
        expected, out = (case.run(backend, window=window, softcap=softcap) for case in (clean, dirty))
        poisoned = dirty.tokens(chunk)
        assert out[poisoned].isnan().all()
        rest = [token for token in range(len(out)) if not poisoned.start <= token < poisoned.stop]
        assert torch.equal(out[rest], expected[rest])


def test_half_precision_keeps_its_dtype() -> None:
    case = Case([(40, 1), (0, 5)], 4, 4, 2, 0)
    expected = case.reference()
    for name in ("q", "k", "v", "k_cache", "v_cache"):
        setattr(case, name, getattr(case, name).bfloat16())
    out = case.run(TorchAttention(CPU))
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, atol=0.05, rtol=0.05)


def test_static_metadata_of_torch_attention_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="TorchAttention"):
        TorchAttention(CPU).static(4)


def test_unknown_backend_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="flash9"):
        create("flash9", CPU)


def test_auto_depends_on_the_device() -> None:
    assert resolve("auto", CPU) == "torch"
    assert resolve("auto", torch.device("cuda")) == "triton"
    assert resolve("torch", torch.device("cuda")) == "torch"
