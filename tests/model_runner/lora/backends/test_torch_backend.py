"""The torch backend against dense float64 arithmetic, on random steps; and no lane changes the rows of another lane."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fixtures.adapters.lora_sites import changed, dense, moved, random_adapter, random_sites, with_vectors
from fixtures.adapters.lora_world import compute, layout
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.messages import LanePages
from model_runner.lora.backends.base import create
from model_runner.lora.backends.torch_backend import SHARED_TOKENS, TorchLora
from model_runner.lora.normal_form import NormalForm
from model_runner.lora.pool.pages import RankPagePool
from model_runner.lora.site import Site, vectors_of

torch.set_num_threads(1)

ALONE = SHARED_TOKENS[-1] + 1

SITES = random_sites()
CPU = torch.device("cpu")
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

ADAPTERS = {
    1: random_adapter(SITES, 1, dict.fromkeys(ALL, 8)),
    2: with_vectors(random_adapter(SITES, 2, {"q_proj": 16, "v_proj": 3}), SITES),
    3: random_adapter(SITES, 3, {"k_proj": 40, "down_proj": 1}),
    4: random_adapter(SITES, 4, {"gate_proj": 128, "o_proj": 17}, layers={1}),
    5: with_vectors(random_adapter(SITES, 5, {"up_proj": 2}, layers={0}), SITES, layers={0}),
    6: random_adapter(SITES, 6, {"q_proj": 512}),
}

MIXES: list[dict[int, float]] = [
    {1: 1.0},
    {2: 1.0},
    {3: 1.0},
    {4: 1.0},
    {5: 1.0},
    {6: 1.0},
    {1: 0.5, 2: -1.25},
    {3: 2.0, 4: -0.5, 5: 1.0},
    {1: 0.0},
    {},
]
"""The adapters of lanes 1, 2, ..., each with its scale."""


def resident(
    shuffle: int, dtype: torch.dtype, device: torch.device = CPU
) -> tuple[RankPagePool, dict[int, dict[str, list[int]]]]:
    """Returns pools with every adapter, and the adapters' pages; a `shuffle` other than 0 scatters the pages."""
    groups = {"qkv": 48, "o": 12, "gate_up": 14, "down": 8}
    groups |= {vectors_of(group): 3 for group in groups}
    random = np.random.default_rng(shuffle)
    free = {
        group: (random.permutation(count) if shuffle else np.arange(count)).tolist() for group, count in groups.items()
    }
    pages = RankPagePool(SITES, groups, len(MIXES), dtype, device)
    granted: dict[int, dict[str, list[int]]] = {}
    for adapter_id, adapter in ADAPTERS.items():
        granted[adapter_id] = {
            group: [free[group].pop(0) for _ in range(n)] for group, n in adapter.footprint.pages.items()
        }
        pages.fill(adapter, granted[adapter_id])
    return pages, granted


def backend(shuffle: int = 0, dtype: torch.dtype = torch.float32, device: torch.device = CPU) -> TorchLora:
    pages, granted = resident(shuffle, dtype, device)
    for lane, mix in enumerate(MIXES, start=1):
        table: dict[str, list[tuple[int, float]]] = {}
        for adapter_id, scale in mix.items():
            for group, numbers in granted[adapter_id].items():
                table.setdefault(group, []).extend((number, scale) for number in numbers)
        pages.set_lane(LanePages(lane, table))
    made = create("torch", pages)
    assert isinstance(made, TorchLora)
    return made


def inputs(tokens: int, site: Site, seed: int = 0) -> torch.Tensor:
    return torch.randn(tokens, site.in_features, generator=torch.Generator().manual_seed(seed))


def expected(x: torch.Tensor, site: Site, chunks: list[tuple[int, int]]) -> torch.Tensor:
    """Returns the result, computed chunk by chunk in dense float64."""
    y = x.double() @ site.base.weight.double().t() + (0 if site.base.bias is None else site.base.bias.double())
    begin = 0
    for lane, length in chunks:
        for adapter_id, scale in (MIXES[lane - 1] if lane else {}).items():
            y[begin : begin + length] += scale * changed(ADAPTERS[adapter_id], site, x[begin : begin + length])
        begin += length
    return y


def check(lora: TorchLora, chunks: list[tuple[int, int]]) -> None:
    meta = lora.plan(layout(chunks))
    for site in SITES:
        x = inputs(sum(length for _, length in chunks), site)
        y = compute(lora, site, x, meta)
        torch.testing.assert_close(y.double(), expected(x, site, chunks), atol=2e-4, rtol=2e-4)


STEPS = {
    "one token": [(1, 1)],
    "a prefill": [(2, 50)],
    "high rank": [(6, 3)],
    "high rank prefill": [(6, 40)],
    "skewed": [(1, 1), (3, 70), (2, 1)],
    "decodes": [(0, 1), (1, 1), (2, 1), (1, 1), (3, 1), (0, 1), (4, 1), (5, 1), (6, 1)],
    "decodes beside prefills": [(2, 1), (5, 1), (4, ALONE), (0, 40), (3, ALONE + 1), (2, 1)],
    "ragged lanes together": [(1, 2), (5, 1), (1, 2), (2, 3), (3, 9), (2, 1), (8, 5)],
    "one lane in pieces": [(4, 20), (0, 3), (4, 30), (1, 2), (4, 1)],
    "mixes": [(7, 1), (8, 1), (1, 2)],
    "a long mix": [(7, 40), (8, 33)],
    "scale 0 and no pages": [(9, 2), (10, 2), (1, 1)],
    "scale 0 alone": [(9, 40)],
}


@pytest.mark.parametrize("shuffle", [0, 1])
@pytest.mark.parametrize("step", STEPS)
def test_steps_equal_float64(step: str, shuffle: int) -> None:
    check(backend(shuffle), STEPS[step])


SCATTERED = backend(shuffle=7)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, len(MIXES)), st.sampled_from([1, 1, 1, 2, 5, 40])), min_size=1, max_size=12))
def test_any_step_equals_float64(chunks: list[tuple[int, int]]) -> None:
    check(SCATTERED, chunks)


def test_base_only_step_has_no_metadata() -> None:
    lora = backend()
    assert lora.plan(layout([(0, 3), (0, 1)])) is None
    assert lora.plan(layout([(10, 3)])) is None
    for site in SITES:
        x = inputs(4, site)
        assert torch.equal(compute(lora, site, x, None), site.base.apply(x))


def test_rows_of_the_base_are_never_changed() -> None:
    lora = backend(shuffle=3)
    chunks = [(0, 2), (1, 1), (0, 1), (2, 40), (0, 5), (7, 1)]
    meta = lora.plan(layout(chunks))
    base = np.repeat(*np.array(chunks).T) == 0
    for site in SITES:
        x = inputs(50, site)
        plain = site.base.apply(x)
        assert torch.equal(compute(lora, site, x, meta)[base], plain[base])


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 3e38])
@pytest.mark.parametrize("chunks", [[(1, 1), (2, 1), (3, 1), (0, 1)], [(1, 40), (2, 40), (3, 1), (0, 1)]])
def test_poisoned_row_leaves_all_others_bit_equal(poison: float, chunks: list[tuple[int, int]]) -> None:
    lora = backend(shuffle=2)
    meta = lora.plan(layout(chunks))
    tokens = sum(length for _, length in chunks)
    for site in SITES:
        for row in (0, 1, tokens - 1):
            x = inputs(tokens, site)
            clean = compute(lora, site, x, meta)
            x[row] = poison
            poisoned = compute(lora, site, x, meta)
            others = [index for index in range(tokens) if index != row]
            assert torch.equal(poisoned[others], clean[others])
            assert not torch.equal(poisoned[row], clean[row])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunks", [[(1, 1), (2, 1), (3, 1), (0, 1)], [(1, 40), (2, 40), (3, 1), (0, 1)]])
def test_largest_weights_leave_other_lanes_bit_equal(dtype: torch.dtype, chunks: list[tuple[int, int]]) -> None:
    lora = backend(shuffle=2, dtype=dtype)
    meta = lora.plan(layout(chunks))
    lanes = np.repeat(*np.array(chunks).T)
    clean = {site.name: compute(lora, site, inputs(len(lanes), site), meta) for site in SITES}
    largest = torch.finfo(dtype).max
    for group, pairs in lora.pages.lanes[2].items():
        for site in SITES:
            if site.group == group:
                held = lora.pages.pools[site.name]
                for page, _ in pairs:
                    held.a_PSRI[page] = largest
                    held.b_PRO[page] = -largest
            if vectors_of(site.group) == group:
                for slot, _ in pairs:
                    lora.pages.vectors[site.name].gain_VO[slot] = torch.finfo(torch.float32).max
    for site in SITES:
        y = compute(lora, site, inputs(len(lanes), site), meta)
        assert torch.equal(y[lanes != 2], clean[site.name][lanes != 2])
        if site.group == "qkv":
            assert not torch.isfinite(y[lanes == 2]).all()


def test_refilled_pages_hold_nothing_of_the_last_adapter() -> None:
    pages = RankPagePool(SITES, {"qkv": 2, "o": 0, "gate_up": 0, "down": 2}, 2, torch.float32, CPU)
    lora = TorchLora(pages)
    first = random_adapter(SITES, 1, {"q_proj": 16, "k_proj": 16, "v_proj": 16, "down_proj": 16})
    second = random_adapter(SITES, 2, {"q_proj": 5}, layers={0})
    run_alone(lora, first, {"qkv": [1], "down": [0]})
    run_alone(lora, second, {"qkv": [1]})


def test_refilled_pages_may_gain_slices() -> None:
    lora = TorchLora(RankPagePool(SITES, {"qkv": 1, "down": 1}, 1, torch.float32, CPU))
    run_alone(lora, random_adapter(SITES, 1, {"q_proj": 5}, layers={0}), {"qkv": [0]})
    wide = random_adapter(SITES, 2, {"q_proj": 2, "v_proj": 16})
    lora.pages.fill(wide, {"qkv": [0]})
    meta = lora.plan(layout([(1, 3)]))
    for site in SITES:
        x = inputs(3, site)
        y = expected(x, site, [(0, 3)]) + x.double() @ dense(wide, site)
        torch.testing.assert_close(compute(lora, site, x, meta).double(), y, atol=2e-4, rtol=2e-4)


def test_scale_of_zero_reads_nothing() -> None:
    lora = backend()
    for held in lora.pages.pools.values():
        held.a_PSRI.fill_(torch.finfo(torch.float32).max)
    meta = lora.plan(layout([(9, 2)]))
    for site in SITES:
        x = inputs(2, site)
        torch.testing.assert_close(
            compute(lora, site, x, meta).double(), expected(x, site, [(0, 2)]), atol=2e-4, rtol=2e-4
        )


def run_alone(lora: TorchLora, adapter: NormalForm, granted: dict[str, list[int]]) -> None:
    lora.pages.fill(adapter, granted)
    lora.pages.set_lane(LanePages(1, {group: [(page, 1.0) for page in numbers] for group, numbers in granted.items()}))
    meta = lora.plan(layout([(1, 3)]))
    for site in SITES:
        x = inputs(3, site)
        y = expected(x, site, [(0, 3)]) + x.double() @ dense(adapter, site)
        torch.testing.assert_close(compute(lora, site, x, meta).double(), y, atol=2e-4, rtol=2e-4)


def test_lane_may_change_its_adapter_between_steps() -> None:
    lora = backend()
    meta = lora.plan(layout([(1, 2)]))
    compute(lora, SITES[0], inputs(2, SITES[0]), meta)
    lora.pages.set_lane(LanePages(1, lora.pages.lanes[2]))
    site = SITES[0]
    x = inputs(2, site)
    y = compute(lora, site, x, lora.plan(layout([(1, 2)])))
    torch.testing.assert_close(y.double(), expected(x, site, [(2, 2)]), atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lora_dtype_may_differ_from_the_models(dtype: torch.dtype) -> None:
    lora = backend(shuffle=4, dtype=dtype)
    chunks = [(1, 40), (2, 1), (7, 1), (0, 2)]
    meta = lora.plan(layout(chunks))
    for site in SITES:
        x = inputs(44, site)
        y = compute(lora, site, x, meta)
        assert y.dtype == torch.float32
        torch.testing.assert_close(y.double(), expected(x, site, chunks), atol=0.6, rtol=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lora_and_model_in_the_same_half_precision(dtype: torch.dtype) -> None:
    lora = backend(shuffle=4, dtype=dtype)
    chunks = [(1, 40), (2, 1), (7, 3), (0, 2), (4, 66)]
    meta = lora.plan(layout(chunks))
    for site in SITES:
        x = inputs(112, site).to(dtype)
        y = compute(lora, moved(site, CPU, dtype), x, meta)
        assert y.dtype == dtype
        torch.testing.assert_close(y.double(), expected(x, site, chunks), atol=0.6, rtol=0.05)


@pytest.mark.gpu
@pytest.mark.parametrize("step", STEPS)
def test_steps_on_a_gpu_equal_float64(step: str) -> None:
    device, chunks = torch.device("cuda"), STEPS[step]
    lora = backend(1, torch.float32, device)
    meta = lora.plan(layout(chunks))
    for site in SITES:
        x = inputs(sum(length for _, length in chunks), site)
        y = compute(lora, moved(site, device, torch.float32), x.to(device), meta)
        torch.testing.assert_close(y.cpu().double(), expected(x, site, chunks), atol=2e-3, rtol=2e-3)
