"""The LoRA kernels against the torch backend, in triton's interpreter or on a GPU: all layouts, ranks, lanes, steps."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from fixtures.adapters.lora_world import MIXES, World, compute, layout

from engine.errors import ConfigError
from model_runner.compute.kernels.triton.interpreter import interpreting
from model_runner.lora.backends import tiled_backend
from model_runner.lora.backends.base import LoraBackend, Options, create, resolve

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ("triton", "csgmv")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}

STEPS = {
    "one token": [(1, 1)],
    "rank 512": [(6, 1), (0, 2), (6, 18)],
    "skewed": [(1, 1), (0, 3), (3, 70), (2, 1)],
    "decodes": [(lane, 1) for lane in (0, 1, 2, 1, 3, 0, 4, 5, 7, 1, 11, 10, 2)],
    "ragged": [(5, 5), (1, 2), (5, 20), (2, 3), (8, 1), (1, 17)],
    "mixes": [(8, 1), (9, 2), (8, 1), (7, 1), (9, 20)],
    "gains and biases": [(7, 1), (0, 1), (7, 33), (9, 1)],
}


@cache
def world(dtype: torch.dtype) -> World:
    return World(dtype, DEVICE)


@cache
def backend(name: str, dtype: torch.dtype, chunk_size: int = 16) -> LoraBackend:
    return create(name, world(dtype).pages, Options(chunk_size=chunk_size))


def check(name: str, dtype: torch.dtype, chunks: list[tuple[int, int]], chunk_size: int = 16) -> None:
    ours, theirs = backend(name, dtype, chunk_size), create("torch", world(dtype).pages)
    step = layout(chunks)
    meta, reference = ours.plan(step), theirs.plan(step)
    for site in world(dtype).sites:
        x = world(dtype).inputs(site, step.tokens)
        y = compute(theirs, site, x, reference)
        difference = (compute(ours, site, x, meta) - y).abs().max().item()
        assert difference <= TOLERANCE[dtype] * max(1.0, y.abs().max().item()), site.name


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("step", STEPS)
def test_steps(step: str, name: str) -> None:
    check(name, torch.float32, STEPS[step])


@pytest.mark.parametrize("name", BACKENDS)
def test_half_precision(name: str) -> None:
    check(name, torch.float16, [(1, 1), (7, 3), (0, 1), (4, 1), (6, 1), (8, 1), (7, 20)])


@pytest.mark.gpu
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("step", STEPS)
def test_brain_floats(step: str, name: str) -> None:
    check(name, torch.bfloat16, STEPS[step])


def test_thirty_two_lanes() -> None:
    here = world(torch.float32)
    pages = here.pages
    kept, most = dict(pages.lanes), pages.max_lanes
    try:
        pages.max_lanes = 32
        for lane in range(1, 33):
            here.set_lane(lane, {1 + lane % 5: 1 + lane / 8})
        backend.cache_clear()
        check("csgmv", torch.float32, [(lane, 1 + lane % 3) for lane in range(33)])
    finally:
        pages.max_lanes = most
        pages.reset_lanes()
        pages.lanes.update(kept)
        backend.cache_clear()


@pytest.mark.parametrize("name", BACKENDS)
def test_tiles_as_a_gpu_has_them(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks, several splits of I, long tiles."""
    monkeypatch.setattr(tiled_backend, "_device_properties", lambda device: (132, False))
    monkeypatch.setattr(tiled_backend, "expand_tiling", _narrow(tiled_backend.expand_tiling))
    backend.cache_clear()
    check(name, torch.float32, [(4, 1), (1, 2), (8, 1), (0, 1)])
    check(name, torch.float32, [(4, 1), (1, 2), (8, 1), (0, 1), (7, 40)], chunk_size=32)
    backend.cache_clear()


def _narrow(choose):  # type: ignore[no-untyped-def]
    """Blocks of 16 columns: the sites here are narrow."""

    def narrow(*arguments):  # type: ignore[no-untyped-def]
        tiling = choose(*arguments)
        return type(tiling)(tiling.rows, 16, tiling.pages, tiling.warps, tiling.stages)

    return narrow


@pytest.mark.parametrize("name", BACKENDS)
def test_a_base_only_step_has_no_metadata(name: str) -> None:
    ours = backend(name, torch.float32)
    assert ours.plan(layout([(0, 3), (0, 1)])) is None
    assert ours.plan(layout([(10, 3), (11, 1)])) is None  # scale 0, and no pages
    for site in world(torch.float32).sites:
        x = world(torch.float32).inputs(site, 4)
        assert torch.equal(compute(ours, site, x, None), compute(create("torch", ours.pages), site, x, None))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:overflow:RuntimeWarning")  # numpy
@pytest.mark.parametrize("name", BACKENDS)
def test_a_poisoned_row_leaves_all_others_bit_equal(name: str) -> None:
    chunks = [(1, 1), (7, 1), (0, 1), (1, 1), (4, 18), (1, 1)]
    ours = backend(name, torch.float32)
    meta = ours.plan(layout(chunks))
    for site in world(torch.float32).sites:
        if site.embeds:
            continue
        x = world(torch.float32).inputs(site, 23)
        clean = compute(ours, site, x, meta)
        for row, poison in ((0, torch.nan), (3, torch.inf), (21, torch.nan)):
            dirty = x.clone()
            dirty[row] = poison
            y = compute(ours, site, dirty, meta)
            others = [index for index in range(23) if index != row]
            assert torch.equal(y[others], clean[others])
            assert not torch.isfinite(y[row]).any()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:overflow:RuntimeWarning")  # numpy
@pytest.mark.parametrize("name", BACKENDS)
def test_poison_in_one_lanes_pages_leaves_all_other_lanes_bit_equal(name: str) -> None:
    here = World(torch.float32, DEVICE)
    ours = create(name, here.pages)
    chunks = [(1, 1), (7, 2), (0, 1), (1, 1), (4, 1), (7, 20), (2, 1)]
    lanes = np.repeat(*np.array(chunks).T)
    meta = ours.plan(layout(chunks))
    clean = {site.name: compute(ours, site, here.inputs(site, 27), meta) for site in here.sites}
    for group, pages in here.granted[7].items():
        for site in here.sites:
            for page in pages:
                if site.group == group:
                    here.pages.pools[site.name].a_PSRI[page] = torch.nan
                    here.pages.pools[site.name].b_PRO[page] = torch.nan
                elif f"{site.group}.vectors" == group:
                    here.pages.vectors[site.name].gain_VO[page] = torch.nan
    for site in here.sites:
        y = compute(ours, site, here.inputs(site, 27), meta)
        assert torch.equal(y[lanes != 7], clean[site.name][lanes != 7])
        if site.group in ("qkv", "o", "down"):
            assert torch.isnan(y[lanes == 7]).any()


@pytest.mark.parametrize("name", BACKENDS)
def test_units_that_are_not_real_are_never_read(name: str) -> None:
    """Nor what an earlier step left in the scratch and in the tables."""
    here = World(torch.float32, DEVICE)
    ours = create(name, here.pages)
    step = layout([(2, 1), (5, 3), (1, 1), (3, 1)])
    meta = ours.plan(step)
    clean = [compute(ours, site, here.inputs(site, 6), meta) for site in here.sites]
    for pool in here.pages.pools.values():
        for page, units_S in enumerate(pool.units_PS):
            pool.b_PRO[page, units_S.max() :] = torch.nan
            for piece, units in enumerate(units_S):
                if pool.a_PSRI.shape[2] == 16 and pool.a_PSRI.shape[3] != 16:
                    pool.a_PSRI[page, piece, units:] = torch.nan
    ours._h.fill_(torch.nan)  # type: ignore[attr-defined]
    again = [compute(ours, site, here.inputs(site, 6), meta) for site in here.sites]
    assert all(torch.equal(a, b) for a, b in zip(clean, again, strict=True))


@pytest.mark.parametrize("name", BACKENDS)
def test_buffers_that_never_move_hold_any_decode_step(name: str) -> None:
    here = World(torch.float32, DEVICE)
    ours, theirs = create(name, here.pages, Options(chunk_size=32, lane_pages=64)), create("torch", here.pages)
    static = ours.static(20)
    table = static.table.data_ptr()
    for lanes in ([1] * 20, [0] * 20, [*range(1, 12), *[0] * 9], [7, 0, 1] * 6 + [0, 0], [2] * 17 + [3, 4, 0]):
        step = layout([(lane, 1) for lane in lanes])
        meta = ours.plan(step, into=static)
        assert meta is static
        assert meta.table.data_ptr() == table
        for site in here.sites[3:]:
            x = here.inputs(site, 20)
            y = compute(theirs, site, x, theirs.plan(step))
            torch.testing.assert_close(compute(ours, site, x, meta), y, atol=1e-4, rtol=1e-5)
        here.set_lane(1, {3: 1.5, 1: 1.0})
    small, large = ours.static(1), ours.static(64)
    assert small.table.numel() < static.table.numel() < large.table.numel()


@pytest.mark.parametrize("name", BACKENDS)
def test_a_plan_is_kept_until_lanes_or_layout_change(name: str) -> None:
    here = World(torch.float32, DEVICE)
    ours = create(name, here.pages)
    step, rows = layout([(1, 1), (2, 1)]), layout([(2, 1)])
    first, head = ours.plan(step), ours.plan(rows)
    assert ours.plan(layout([(1, 1), (2, 1)])) is first
    assert ours.plan(rows) is head
    assert ours.plan(layout([(1, 2)])) is not first
    here.set_lane(1, {4: 1.0})
    changed = ours.plan(step)
    assert changed is not first
    site = next(site for site in here.sites if site.group == "o")
    x = here.inputs(site, 2)
    theirs = create("torch", here.pages)
    expected = compute(theirs, site, x, theirs.plan(step))
    torch.testing.assert_close(compute(ours, site, x, changed), expected, atol=1e-4, rtol=1e-5)


def test_a_lane_longer_than_was_said_is_our_own_fault() -> None:
    ours = create("csgmv", world(torch.float32).pages, Options(lane_pages=2))
    with pytest.raises(AssertionError, match="at most 2"):
        ours.plan(layout([(6, 1)]))


def test_without_a_gpu_the_kernels_are_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    pages = World(torch.float32).pages
    monkeypatch.setattr(tiled_backend, "interpreting", lambda: False)
    for name in BACKENDS:
        with pytest.raises(ConfigError, match=f"--lora-backend {name} needs a GPU") as caught:
            create(name, pages)
        assert "\n" not in caught.value.message


def test_auto_is_csgmv_where_there_is_a_gpu() -> None:
    assert [resolve("auto", torch.device(device)) for device in ("cpu", "cuda")] == ["torch", "csgmv"]
    assert resolve("triton", torch.device("cpu")) == "triton"


def test_the_tests_of_kernels_run_kernels() -> None:
    assert interpreting() == (DEVICE == "cpu")
    assert len(MIXES) == 11
