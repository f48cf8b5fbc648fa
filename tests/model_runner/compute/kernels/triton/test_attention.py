"""The paged attention kernels: rows cut into spans and merged, groups wider than a tile, and no register spills."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from fixtures.models.ahead_of_time import compile_for
from fixtures.models.attention_cases import KERNELS, SCALE, Case, kernel_case

from model_runner.compute.attention.packing import HEADER, PackedLayout, keys_seen, tiles_of
from model_runner.compute.kernels.triton import attention
from model_runner.compute.kernels.triton.attention_shapes import (
    MAX_SPLITS,
    Shape,
    decode_shape,
    padded_head,
    parts,
    prefill_shape,
    splits,
)
from model_runner.compute.kernels.triton.paged_attention import attend_tiles
from model_runner.compute.kernels.triton.store_kv import store_kv
from model_runner.compute.kernels.triton.target import INTERPRETER

SMALL = Shape(queries=4, heads=2, rows=16, keys=16, warps=4, stages=1)
CAPABILITIES = (80, 90, 100)


def attend(
    case: Case, shape: Shape, spans: int, window: int | None = None, softcap: float | None = None
) -> torch.Tensor:
    """Returns [T, N, D] on the CPU, computed with tiles of this shape, each cut into about `spans` spans."""
    packed = PackedLayout(case.layout)
    host = torch.empty(packed.size, dtype=torch.int32)
    packed.write(host.numpy())
    offsets, buffer = packed.parts, host.to(KERNELS)
    store_kv(case.k, case.v, case.k_cache, case.v_cache, buffer[offsets.slots :][: offsets.tokens])
    out = torch.full_like(case.q, torch.inf)
    decodes, prefills = host[HEADER : offsets.slots].view(-1, 4).numpy(), tiles_of(packed.prefills_L4, shape.queries)
    for tiles, variant in ((decodes, replace(shape, queries=1)), (prefills, shape)):
        if len(tiles):
            attend_tiles(
                case.q,
                case.k_cache,
                case.v_cache,
                out,
                torch.from_numpy(tiles).to(KERNELS),
                buffer[offsets.pages :],
                torch.tensor([keys_seen(tiles)], dtype=torch.int32, device=KERNELS),
                variant,
                scale=SCALE,
                window=window,
                softcap=softcap,
                spans=spans,
            )
    return out.cpu()


@pytest.mark.parametrize("spans", [1, 3, 32])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (21, 2.0)])
def test_spans_do_not_change_the_result(spans: int, window: int | None, softcap: float | None) -> None:
    case = kernel_case([(350, 1), (3, 1), (60, 6), (0, 1)], 4, 4, 2, 2, head_dim=16)
    out = attend(case, SMALL, spans, window, softcap)
    torch.testing.assert_close(out, case.reference(window, softcap), atol=2e-5, rtol=1e-5)


def test_group_wider_than_a_tile_is_split_among_programs() -> None:
    case = kernel_case([(20, 1), (9, 3)], 4, 7, 1, 5, head_dim=16)
    out = attend(case, replace(SMALL, heads=4), 2)
    torch.testing.assert_close(out, case.reference(), atol=2e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning", "ignore:invalid value:RuntimeWarning")  # numpy
@pytest.mark.parametrize("window", [None, 30])
def test_nan_stays_in_its_row_when_rows_are_cut(window: int | None) -> None:
    chunks = [(70, 1), (60, 5), (90, 1)]
    for chunk in (0, 1):
        clean, dirty = (kernel_case(chunks, 4, 4, 2, 3) for _ in range(2))
        dirty.poison(chunk)
        expected, out = (attend(case, SMALL, 4, window) for case in (clean, dirty))
        poisoned = dirty.tokens(chunk)
        assert out[poisoned].isnan().all()
        out[poisoned] = expected[poisoned]
        assert torch.equal(out, expected)


@pytest.mark.parametrize("group", [1, 2, 4, 7, 8, 71, 128])
@pytest.mark.parametrize("head_dim", [8, 64, 80, 96, 128, 256])
def test_shapes_hold_all_query_heads(group: int, head_dim: int) -> None:
    for capability in (INTERPRETER, 80, 90, 120):
        for itemsize in (2, 4):
            for choose in (decode_shape, prefill_shape):
                shape = choose(group, head_dim, itemsize, capability)
                assert 1 <= shape.queries * shape.heads <= shape.rows
                assert parts(group, shape) * shape.heads >= group
                assert all(n & (n - 1) == 0 for n in (shape.rows, shape.keys, padded_head(head_dim)))
            assert decode_shape(group, head_dim, itemsize, capability).queries == 1


def test_rows_are_cut_until_the_device_is_full() -> None:
    decode, prefill = (choose(4, 128, 2, 90) for choose in (decode_shape, prefill_shape))
    assert splits(1, 8, decode, 132) == 33
    assert splits(8, 8, decode, 132) == 4
    assert splits(256, 8, decode, 132) == 4  # a long row among short ones is cut as well
    assert splits(256, 8, prefill, 132) == 1
    assert splits(1, 1, prefill, 132) == MAX_SPLITS
    assert splits(8, 8, decode, 1) == 1  # programs run one after another, so more of them do not help


def signature(dtype: str) -> dict[str, str]:
    pointers = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), f"*{dtype}")
    numbers = {"q_stride": "i32", "page_stride": "i32", "slot_stride": "i32", "inner": "fp32", "outer": "fp32"}
    return {
        **pointers,
        **dict.fromkeys(("partial_ptr", "lse_ptr"), "*fp32"),
        **dict.fromkeys(("tiles_ptr", "pages_ptr", "total_ptr"), "*i32"),
        **numbers,
        **dict.fromkeys(("window", "splits", "share"), "i32"),
    }


@pytest.mark.parametrize("choose", [decode_shape, prefill_shape])
@pytest.mark.parametrize(
    ("group", "head_dim", "dtype", "windowed", "capped", "capability"),
    [
        *((4, 128, "bf16", False, False, capability) for capability in CAPABILITIES),
        *((2, 256, "bf16", True, True, capability) for capability in CAPABILITIES),
        (7, 80, "fp16", True, False, 90),
    ],
)
def test_attention_kernel_compiles_without_spills(
    group: int, head_dim: int, dtype: str, windowed: bool, capped: bool, choose: object, capability: int
) -> None:
    shape: Shape = choose(group, head_dim, 2, capability)  # type: ignore[operator]
    constants = {
        "G": group,
        "HEADS": shape.heads,
        "D": head_dim,
        "BLOCK_D": padded_head(head_dim),
        "PAGE": 16,
        "QUERIES": shape.queries,
        "BLOCK_M": shape.rows,
        "BLOCK_N": shape.keys,
        "WINDOWED": windowed,
        "CAPPED": capped,
    }
    strides = ("q_stride", "page_stride", "slot_stride")
    compiled = compile_for(
        attention.attend_kernel,
        signature(dtype),
        constants,
        capability,
        shape.warps,
        shape.stages,
        aligned=strides,
    )
    assert compiled.spills == 0


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_merge_kernel_compiles_without_spills(capability: int) -> None:
    types = {"out_ptr": "*bf16", "partial_ptr": "*fp32", "lse_ptr": "*fp32", "tiles_ptr": "*i32", "total_ptr": "*i32"}
    counts = dict.fromkeys(("window", "splits", "share", "tiles"), "i32")
    constants = {"D": 128, "BLOCK_D": 128, "QUERIES": 1, "BLOCK_N": 64, "BLOCK_S": attention.MERGE_BLOCK}
    assert compile_for(attention.merge_kernel, {**types, **counts}, constants, capability).spills == 0
