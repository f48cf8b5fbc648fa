"""The torch attention backend against a slow reference: one token at a time, over each row's own keys and values."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import ConfigError
from model_runner.attention.base import create
from model_runner.attention.torch_backend import TorchAttention
from model_runner.layout import Layout

CPU = torch.device("cpu")
SCALE = 0.3
D = 8


class Case:
    """A step over rows with random pasts: caches hold NaN wherever no row has a token."""

    def __init__(self, chunks: list[tuple[int, int]], page_size: int, heads: int, kv_heads: int, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        starts, lengths = (np.array(column, np.int32) for column in zip(*chunks, strict=True))
        needed = [-(-(start + length) // page_size) for start, length in chunks]
        tables = np.zeros((len(chunks) + 2, max(needed) + 1), np.int32)
        numbers = torch.randperm(sum(needed), generator=draw).add(1).tolist()
        rows = torch.randperm(len(chunks) + 2, generator=draw)[: len(chunks)].to(torch.int32).numpy()
        for row, count in zip(rows, needed, strict=True):
            tables[row, :count] = [numbers.pop() for _ in range(count)]
        self.layout = Layout(rows, starts, lengths, np.zeros_like(rows), tables, page_size)
        self.past = [torch.randn(2, start, kv_heads, D, generator=draw) for start, _ in chunks]
        self.q = torch.randn(int(lengths.sum()), heads, D, generator=draw)
        self.k, self.v = torch.randn(2, int(lengths.sum()), kv_heads, D, generator=draw)
        self.k_cache, self.v_cache = torch.full((2, sum(needed) + 1, page_size, kv_heads, D), torch.nan)
        for index, row in enumerate(rows):
            for position in range(starts[index]):
                page, place = tables[row, position // page_size], position % page_size
                self.k_cache[page, place], self.v_cache[page, place] = self.past[index][:, position]

    def run(self, window: int | None = None) -> torch.Tensor:
        backend = create("torch", CPU)
        meta = backend.plan(self.layout)
        return backend.attend(self.q, self.k, self.v, self.k_cache, self.v_cache, meta, scale=SCALE, window=window)

    def reference(self, window: int | None) -> torch.Tensor:
        out, offsets = [], self.layout.offsets()
        for index, past in enumerate(self.past):
            here = slice(int(offsets[index]), int(offsets[index + 1]))
            keys, values = torch.cat([past, torch.stack([self.k[here], self.v[here]])], dim=1)
            out += [
                attend_one(self.q[here][i], keys, values, past.shape[1] + i, window) for i in range(len(self.q[here]))
            ]
        return torch.stack(out)


def attend_one(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, position: int, window: int | None
) -> torch.Tensor:
    """[N, D] in float64: one token at `position` over its row's [L, K, D]."""
    first = 0 if window is None else max(0, position - window + 1)
    group = q.shape[0] // keys.shape[1]
    heads = []
    for head in range(q.shape[0]):
        k, v = (x[first : position + 1, head // group].double() for x in (keys, values))
        heads.append((q[head].double() @ k.T * SCALE).softmax(-1) @ v)
    return torch.stack(heads).float()


CHUNKS = st.lists(st.tuples(st.integers(0, 90), st.integers(1, 9) | st.just(1)), min_size=1, max_size=7)


@given(
    chunks=CHUNKS,
    page_size=st.sampled_from([1, 3, 16]),
    heads=st.sampled_from([(4, 4), (4, 2), (6, 1)]),
    window=st.none() | st.integers(1, 40),
    seed=st.integers(0, 99),
)
def test_equals_the_reference(
    chunks: list[tuple[int, int]], page_size: int, heads: tuple[int, int], window: int | None, seed: int
) -> None:
    case = Case(chunks, page_size, *heads, seed)
    torch.testing.assert_close(case.run(window), case.reference(window), atol=1e-5, rtol=1e-5)


def test_layers_of_different_windows_share_one_plan() -> None:
    case = Case([(40, 1), (0, 30), (12, 5)], 4, 4, 2, 0)
    backend = TorchAttention(CPU)
    meta = backend.plan(case.layout)
    for window in (None, 7, None, 16, 7):
        ours = backend.attend(case.q, case.k, case.v, case.k_cache, case.v_cache, meta, scale=SCALE, window=window)
        torch.testing.assert_close(ours, case.reference(window), atol=1e-5, rtol=1e-5)


def test_keys_and_values_are_stored_at_their_slots() -> None:
    case = Case([(5, 3), (2, 1)], 4, 4, 2, 1)
    before = case.k_cache.clone()
    case.run()
    slots = case.layout.slots().tolist()
    flat = case.k_cache.flatten(0, 1)
    assert torch.equal(flat[slots], case.k)
    assert torch.equal(case.v_cache.flatten(0, 1)[slots], case.v)
    others = [slot for slot in range(len(flat)) if slot not in slots]
    torch.testing.assert_close(flat[others], before.flatten(0, 1)[others], equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("window", [None, 10])
@pytest.mark.parametrize("chunks", [[(30, 1), (70, 1), (3, 1)], [(30, 1), (20, 6), (0, 8), (9, 1)]])
def test_nan_in_one_row_leaves_the_others_bit_equal(chunks: list[tuple[int, int]], window: int | None) -> None:
    for victim in range(len(chunks)):
        clean, dirty = (Case(chunks, 4, 4, 2, 3) for _ in range(2))
        offsets = dirty.layout.offsets()
        mine = slice(int(offsets[victim]), int(offsets[victim + 1]))
        for tensor in (dirty.q, dirty.k, dirty.v):
            tensor[mine] = torch.nan
        pages = dirty.layout.tables[dirty.layout.rows_C[victim]].tolist()
        dirty.k_cache[pages] = dirty.v_cache[pages] = torch.nan  # its own pages, and scratch
        expected, ours = clean.run(window), dirty.run(window)
        assert ours[mine].isnan().all()
        rest = [token for token in range(len(ours)) if not mine.start <= token < mine.stop]
        assert torch.equal(ours[rest], expected[rest])


def test_half_precision_keeps_its_dtype() -> None:
    case = Case([(40, 1), (0, 5)], 4, 4, 2, 0)
    expected = case.reference(None)
    for name in ("q", "k", "v", "k_cache", "v_cache"):
        setattr(case, name, getattr(case, name).bfloat16())
    ours = case.run()
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours.float(), expected, atol=0.05, rtol=0.05)


def test_an_unknown_backend_is_named() -> None:
    with pytest.raises(ConfigError, match="flash9"):
        create("flash9", CPU)
