"""The triton attention backend against the slow reference: every kind of step, in the interpreter or on a GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fixtures.models.attention_cases import CPU, KERNELS, SCALE, Case, kernel_case
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import ConfigError
from model_runner.compute.attention import triton_backend
from model_runner.compute.attention.base import create
from model_runner.compute.attention.packing import PackedLayout, keys_seen, tiles_of
from model_runner.compute.attention.triton_backend import StaticTritonMetadata, TritonAttention
from model_runner.step.layout import Layout

HALF, TOLERANCE = (
    (torch.float16, 4e-3) if KERNELS == CPU else (torch.bfloat16, 3e-2)
)  # triton's interpreter computes bfloat16 incorrectly
CHUNKS = st.lists(st.tuples(st.integers(0, 90), st.integers(1, 9) | st.just(1)), min_size=1, max_size=4)


@settings(max_examples=25)
@given(
    chunks=CHUNKS,
    page_size=st.sampled_from([1, 4, 16]),
    heads=st.sampled_from([(4, 4), (4, 2), (6, 1)]),
    head_dim=st.sampled_from([8, 24, 80]),
    window=st.none() | st.integers(1, 40),
    softcap=st.none() | st.sampled_from([0.5, 5.0]),
    seed=st.integers(0, 99),
)
def test_triton_attention_equals_the_reference(
    chunks: list[tuple[int, int]],
    page_size: int,
    heads: tuple[int, int],
    head_dim: int,
    window: int | None,
    softcap: float | None,
    seed: int,
) -> None:
    case = kernel_case(chunks, page_size, *heads, seed, head_dim=head_dim)
    out = case.run(create("triton", KERNELS), window=window, softcap=softcap)
    torch.testing.assert_close(out, case.reference(window, softcap), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_half_precision_is_near_the_reference(head_dim: int) -> None:
    case = kernel_case([(70, 1), (5, 20), (9, 1)], 16, 4, 2, head_dim, head_dim=head_dim, dtype=HALF)
    out = case.run(TritonAttention(KERNELS))
    assert out.dtype == HALF
    torch.testing.assert_close(out.float(), case.reference(), atol=TOLERANCE, rtol=TOLERANCE)


def test_long_chunks_over_long_prefixes() -> None:
    case = kernel_case([(131, 70), (0, 1), (0, 65)], 16, 4, 2, 7, head_dim=16)
    out = case.run(TritonAttention(KERNELS))
    torch.testing.assert_close(out, case.reference(), atol=2e-5, rtol=1e-5)


def test_slices_of_a_fused_qkv_need_no_copy() -> None:
    case = kernel_case([(12, 1), (5, 4)], 4, 4, 2, 1)
    fused = torch.cat([case.q, case.k, case.v], dim=1)
    case.q, case.k, case.v = fused[:, :4], fused[:, 4:6], fused[:, 6:]
    assert not case.q.is_contiguous()
    torch.testing.assert_close(case.run(TritonAttention(KERNELS)), case.reference(), atol=2e-5, rtol=1e-5)


def test_keys_and_values_are_stored_at_their_slots() -> None:
    case = kernel_case([(5, 3), (2, 1)], 4, 4, 2, 1)
    before = case.k_cache.clone()
    case.run(TritonAttention(KERNELS))
    slots = case.layout.slots().tolist()
    flat = case.k_cache.flatten(0, 1)
    assert torch.equal(flat[slots], case.k)
    assert torch.equal(case.v_cache.flatten(0, 1)[slots], case.v)
    others = [slot for slot in range(len(flat)) if slot not in slots]
    torch.testing.assert_close(flat[others], before.flatten(0, 1)[others], equal_nan=True, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning", "ignore:invalid value:RuntimeWarning")  # numpy
@pytest.mark.parametrize("window", [None, 10])
@pytest.mark.parametrize("chunks", [[(30, 1), (70, 1), (3, 1)], [(30, 1), (20, 6), (0, 8)]])
def test_nan_in_one_row_leaves_the_others_bit_equal(chunks: list[tuple[int, int]], window: int | None) -> None:
    backend = TritonAttention(KERNELS)
    for chunk in range(len(chunks)):
        clean, dirty = (kernel_case(chunks, 4, 4, 2, 3) for _ in range(2))
        dirty.poison(chunk)
        expected, out = (case.run(backend, window=window) for case in (clean, dirty))
        poisoned = dirty.tokens(chunk)
        assert out[poisoned].isnan().all()
        out[poisoned] = expected[poisoned]
        assert torch.equal(out, expected)


def test_static_plan_equals_an_eager_one_at_a_fixed_address() -> None:
    backend = TritonAttention(KERNELS)
    static, addresses = backend.static(3), []
    for seed, starts in ((0, (40, 0, 7)), (1, (3, 90, 31)), (2, (0, 0, 0))):
        eager, captured = (kernel_case([(start, 1) for start in starts], 4, 4, 2, seed) for _ in range(2))
        captured.layout = wide(captured.layout)
        meta = backend.plan(captured.layout, static)
        assert meta is static
        assert torch.equal(captured.run(backend, meta, window=20), eager.run(backend, window=20))
        assert static.meta is not None
        addresses.append(
            [part.data_ptr() for part in (static.meta.slots_T, static.meta.pages, static.meta.decodes.total)]
        )
    assert addresses[0] == addresses[1] == addresses[2]


def test_static_plans_of_all_sizes_share_one_buffer() -> None:
    backend = TritonAttention(KERNELS)
    large, small = backend.static(4), backend.static(2)
    for static, starts in ((large, (9, 30, 2, 5)), (small, (50, 3)), (large, (1, 2, 60, 4))):
        case = kernel_case([(start, 1) for start in starts], 4, 4, 2, 0)
        case.layout = wide(case.layout)
        out = case.run(backend, backend.plan(case.layout, static))
        torch.testing.assert_close(out, case.reference(), atol=2e-5, rtol=1e-5)
    assert isinstance(large, StaticTritonMetadata)
    assert large.buffer is small.buffer


def wide(layout: Layout) -> Layout:
    """Returns the same step with a page table for longer rows."""
    tables = np.zeros((len(layout.tables), 256), np.int32)
    tables[:, : layout.tables.shape[1]] = layout.tables
    return Layout(layout.rows_C, layout.starts_C, layout.lengths_C, layout.lanes_C, tables, layout.page_size)


def test_padding_of_a_captured_step_changes_no_row() -> None:
    """Scratch rows have a page table of zeros, so all of them write to the first slot of page 0."""
    case = kernel_case([(40, 1), (7, 1)], 4, 4, 2, 0)
    expected = case.reference()
    layout = case.layout
    scratch = next(row for row in range(len(layout.tables)) if row not in layout.rows_C)
    more = np.array([scratch, scratch], np.int32)
    columns = [np.append(layout.rows_C, more)] + [
        np.append(column, more * 0 + value)
        for column, value in ((layout.starts_C, 0), (layout.lengths_C, 1), (layout.lanes_C, 0))
    ]
    case.layout = Layout(*columns, layout.tables, layout.page_size)
    case.q, case.k, case.v = (torch.cat([x, torch.full_like(x[:2], torch.nan)]) for x in (case.q, case.k, case.v))
    torch.testing.assert_close(case.run(TritonAttention(KERNELS))[:2], expected, atol=2e-5, rtol=1e-5)


@given(
    chunks=st.lists(st.tuples(st.integers(0, 300), st.integers(1, 80)), min_size=1, max_size=8),
    queries=st.integers(1, 40),
)
def test_tiles_cover_every_token_once(chunks: list[tuple[int, int]], queries: int) -> None:
    case = Case(chunks, 4, 1, 1, 0, head_dim=1)
    tiles = tiles_of(PackedLayout(case.layout).prefills_L4, queries)
    positions = case.layout.positions()
    covered = [
        (token + i, position + i)
        for token, position, count, _ in tiles.tolist()
        for i in range(count)
        if count <= queries
    ]
    offsets, long = case.layout.offsets(), case.layout.lengths_C > 1
    tokens = [t for chunk in np.flatnonzero(long) for t in range(offsets[chunk], offsets[chunk + 1])]
    assert sorted(covered) == [(token, positions[token]) for token in tokens]
    seen = tiles[:, 1] + tiles[:, 2]
    assert (np.diff(seen) <= 0).all()
    assert keys_seen(tiles) == seen.sum()


def test_parts_of_a_plan_are_aligned_for_any_size() -> None:
    for count in range(1, 6):
        case = kernel_case([(index, 1 + index % 2) for index in range(count)], 4, 1, 1, 0)
        parts = PackedLayout(case.layout).parts
        assert parts.slots % 4 == parts.pages % 4 == 0


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 100])
def test_replay_of_a_captured_step_follows_its_plan(window: int | None) -> None:
    backend = TritonAttention(KERNELS)
    static, shapes = backend.static(3), {"head_dim": 128, "dtype": torch.bfloat16}
    held = kernel_case([(900, 1), (2000, 1), (1500, 1)], 16, 32, 8, 0, **shapes)
    held.layout = wide(held.layout)
    tensors = held.q, held.k, held.v, held.k_cache, held.v_cache
    backend.plan(held.layout, static)
    backend.attend(*tensors, static, scale=SCALE, window=window)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = backend.attend(*tensors, static, scale=SCALE, window=window)
    for seed, starts in ((1, (3, 700, 0)), (2, (2000, 40, 1800))):
        case = kernel_case([(start, 1) for start in starts], 16, 32, 8, seed, **shapes)
        pages = len(case.k_cache)
        held.k_cache[:pages], held.v_cache[:pages] = case.k_cache, case.v_cache
        for buffer, values in zip((held.q, held.k, held.v), (case.q, case.k, case.v), strict=True):
            buffer.copy_(values)
        backend.plan(wide(case.layout), static)
        graph.replay()
        torch.testing.assert_close(out.cpu().float(), case.reference(window), atol=3e-2, rtol=3e-2)


def test_cpu_without_the_interpreter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_backend, "interpreting", lambda: False)
    with pytest.raises(ConfigError, match="--attention-backend triton: needs a CUDA device"):
        create("triton", CPU)
