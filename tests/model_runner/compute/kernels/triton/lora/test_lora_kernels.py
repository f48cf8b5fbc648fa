"""The LoRA kernels against the torch backend, in triton's interpreter or on a GPU: many layouts, ranks and lanes."""

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
    lora, torch_lora = backend(name, dtype, chunk_size), create("torch", world(dtype).pages)
    step = layout(chunks)
    meta, reference = lora.plan(step), torch_lora.plan(step)
    for site in world(dtype).sites:
        x = world(dtype).inputs(site, step.tokens)
        y = compute(torch_lora, site, x, reference)
        difference = (compute(lora, site, x, meta) - y).abs().max().item()
        assert difference <= TOLERANCE[dtype] * max(1.0, y.abs().max().item()), site.name


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("step", STEPS)
def test_backend_equals_torch_in_float32(step: str, name: str) -> None:
    check(name, torch.float32, STEPS[step])


@pytest.mark.parametrize("name", BACKENDS)
def test_backend_is_near_torch_in_float16(name: str) -> None:
    check(name, torch.float16, [(1, 1), (7, 3), (0, 1), (4, 1), (6, 1), (8, 1), (7, 20)])


@pytest.mark.gpu
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("step", STEPS)
def test_backend_is_near_torch_in_bfloat16(step: str, name: str) -> None:
    check(name, torch.bfloat16, STEPS[step])


def test_backend_equals_torch_with_32_lanes() -> None:
    own_world = world(torch.float32)
    pages = own_world.pages
    kept, most = dict(pages.lanes), pages.max_lanes
    try:
        pages.max_lanes = 32
        for lane in range(1, 33):
            own_world.set_lane(lane, {1 + lane % 5: 1 + lane / 8})
        backend.cache_clear()
        check("csgmv", torch.float32, [(lane, 1 + lane % 3) for lane in range(33)])
    finally:
        pages.max_lanes = most
        pages.reset_lanes()
        pages.lanes.update(kept)
        backend.cache_clear()


@pytest.mark.parametrize("name", BACKENDS)
def test_backend_equals_torch_with_the_tiles_of_a_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Covers several blocks of columns, several splits of I, and long tiles."""
    monkeypatch.setattr(tiled_backend, "_device_properties", lambda device: (132, False))
    monkeypatch.setattr(tiled_backend, "expand_tiling", _narrow(tiled_backend.expand_tiling))
    backend.cache_clear()
    check(name, torch.float32, [(4, 1), (1, 2), (8, 1), (0, 1)])
    check(name, torch.float32, [(4, 1), (1, 2), (8, 1), (0, 1), (7, 40)], chunk_size=32)
    backend.cache_clear()


def _narrow(choose):  # type: ignore[no-untyped-def]
    """Makes `choose` return blocks of 16 columns, because the sites of this test are narrow."""

    def narrow(*arguments):  # type: ignore[no-untyped-def]
        tiling = choose(*arguments)
        return type(tiling)(tiling.rows, 16, tiling.pages, tiling.warps, tiling.stages)

    return narrow


@pytest.mark.parametrize("name", BACKENDS)
def test_step_of_the_base_alone_has_no_metadata(name: str) -> None:
    lora = backend(name, torch.float32)
    assert lora.plan(layout([(0, 3), (0, 1)])) is None
    assert lora.plan(layout([(10, 3), (11, 1)])) is None  # one lane has scale 0, the other has no pages
    for site in world(torch.float32).sites:
        x = world(torch.float32).inputs(site, 4)
        assert torch.equal(compute(lora, site, x, None), compute(create("torch", lora.pages), site, x, None))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:overflow:RuntimeWarning")  # numpy
@pytest.mark.parametrize("name", BACKENDS)
def test_poisoned_row_leaves_other_rows_bit_equal(name: str) -> None:
    chunks = [(1, 1), (7, 1), (0, 1), (1, 1), (4, 18), (1, 1)]
    lora = backend(name, torch.float32)
    meta = lora.plan(layout(chunks))
    for site in world(torch.float32).sites:
        if site.embeds:
            continue
        x = world(torch.float32).inputs(site, 23)
        clean = compute(lora, site, x, meta)
        for row, poison in ((0, torch.nan), (3, torch.inf), (21, torch.nan)):
            dirty = x.clone()
            dirty[row] = poison
            y = compute(lora, site, dirty, meta)
            others = [index for index in range(23) if index != row]
            assert torch.equal(y[others], clean[others])
            assert not torch.isfinite(y[row]).any()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:overflow:RuntimeWarning")  # numpy
@pytest.mark.parametrize("name", BACKENDS)
def test_poisoned_pages_leave_other_lanes_bit_equal(name: str) -> None:
    own_world = World(torch.float32, DEVICE)
    lora = create(name, own_world.pages)
    chunks = [(1, 1), (7, 2), (0, 1), (1, 1), (4, 1), (7, 20), (2, 1)]
    lanes = np.repeat(*np.array(chunks).T)
    meta = lora.plan(layout(chunks))
    clean = {site.name: compute(lora, site, own_world.inputs(site, 27), meta) for site in own_world.sites}
    for group, pages in own_world.granted[7].items():
        for site in own_world.sites:
            for page in pages:
                if site.group == group:
                    own_world.pages.pools[site.name].a_PSRI[page] = torch.nan
                    own_world.pages.pools[site.name].b_PRO[page] = torch.nan
                elif f"{site.group}.vectors" == group:
                    own_world.pages.vectors[site.name].gain_VO[page] = torch.nan
    for site in own_world.sites:
        y = compute(lora, site, own_world.inputs(site, 27), meta)
        assert torch.equal(y[lanes != 7], clean[site.name][lanes != 7])
        if site.group in ("qkv", "o", "down"):
            assert torch.isnan(y[lanes == 7]).any()


@pytest.mark.parametrize("name", BACKENDS)
def test_unused_units_are_never_read(name: str) -> None:
    """Results of an earlier step in the scratch buffer and in the tables are not read either."""
    own_world = World(torch.float32, DEVICE)
    lora = create(name, own_world.pages)
    step = layout([(2, 1), (5, 3), (1, 1), (3, 1)])
    meta = lora.plan(step)
    clean = [compute(lora, site, own_world.inputs(site, 6), meta) for site in own_world.sites]
    for pool in own_world.pages.pools.values():
        for page, units_S in enumerate(pool.units_PS):
            pool.b_PRO[page, units_S.max() :] = torch.nan
            for piece, units in enumerate(units_S):
                if pool.a_PSRI.shape[2] == 16 and pool.a_PSRI.shape[3] != 16:
                    pool.a_PSRI[page, piece, units:] = torch.nan
    lora._h.fill_(torch.nan)  # type: ignore[attr-defined]
    again = [compute(lora, site, own_world.inputs(site, 6), meta) for site in own_world.sites]
    assert all(torch.equal(a, b) for a, b in zip(clean, again, strict=True))


@pytest.mark.parametrize("name", BACKENDS)
def test_static_metadata_holds_any_decode_step(name: str) -> None:
    own_world = World(torch.float32, DEVICE)
    lora, torch_lora = (
        create(name, own_world.pages, Options(chunk_size=32, lane_pages=64)),
        create("torch", own_world.pages),
    )
    static = lora.static(20)
    table = static.table.data_ptr()
    for lanes in ([1] * 20, [0] * 20, [*range(1, 12), *[0] * 9], [7, 0, 1] * 6 + [0, 0], [2] * 17 + [3, 4, 0]):
        step = layout([(lane, 1) for lane in lanes])
        meta = lora.plan(step, into=static)
        assert meta is static
        assert meta.table.data_ptr() == table
        for site in own_world.sites[3:]:
            x = own_world.inputs(site, 20)
            y = compute(torch_lora, site, x, torch_lora.plan(step))
            torch.testing.assert_close(compute(lora, site, x, meta), y, atol=1e-4, rtol=1e-5)
        own_world.set_lane(1, {3: 1.5, 1: 1.0})
    small, large = lora.static(1), lora.static(64)
    assert small.table.numel() < static.table.numel() < large.table.numel()


@pytest.mark.parametrize("name", BACKENDS)
def test_plan_is_reused_until_lanes_or_layout_change(name: str) -> None:
    own_world = World(torch.float32, DEVICE)
    lora = create(name, own_world.pages)
    step, rows = layout([(1, 1), (2, 1)]), layout([(2, 1)])
    first, head = lora.plan(step), lora.plan(rows)
    assert lora.plan(layout([(1, 1), (2, 1)])) is first
    assert lora.plan(rows) is head
    assert lora.plan(layout([(1, 2)])) is not first
    own_world.set_lane(1, {4: 1.0})
    changed = lora.plan(step)
    assert changed is not first
    site = next(site for site in own_world.sites if site.group == "o")
    x = own_world.inputs(site, 2)
    torch_lora = create("torch", own_world.pages)
    expected = compute(torch_lora, site, x, torch_lora.plan(step))
    torch.testing.assert_close(compute(lora, site, x, changed), expected, atol=1e-4, rtol=1e-5)


def test_lane_with_more_pages_than_the_option_is_refused() -> None:
    lora = create("csgmv", world(torch.float32).pages, Options(lane_pages=2))
    with pytest.raises(AssertionError, match="at most 2"):
        lora.plan(layout([(6, 1)]))


def test_lora_kernels_without_a_gpu_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pages = World(torch.float32).pages
    monkeypatch.setattr(tiled_backend, "interpreting", lambda: False)
    for name in BACKENDS:
        with pytest.raises(ConfigError, match=f"--lora-backend {name} needs a GPU") as caught:
            create(name, pages)
        assert "\n" not in caught.value.message


def test_auto_is_csgmv_on_a_gpu() -> None:
    assert [resolve("auto", torch.device(device)) for device in ("cpu", "cuda")] == ["torch", "csgmv"]
    assert resolve("triton", torch.device("cpu")) == "triton"


def test_kernels_run_in_the_interpreter_without_a_gpu() -> None:
    assert interpreting() == (DEVICE == "cpu")
    assert len(MIXES) == 11
