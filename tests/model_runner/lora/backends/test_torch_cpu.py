"""All lanes in one call of the delta kernel once it is compiled: its plan, and its results against dense float64.

The kernel here is the delta kernel's torch reference; compute/kernels/cpu/test_model.py has the compiled one.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import pytest
import torch
from fixtures.adapters.lora_sites import changed, random_adapter, random_sites, with_vectors
from fixtures.adapters.lora_world import compute, layout
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.messages import LanePages
from model_runner.compute.kernels.cpu.functions.registry import spec_for
from model_runner.compute.kernels.cpu.functions.spec import Argument, Kernel, KernelKey
from model_runner.compute.kernels.cpu.kernels import KernelSet
from model_runner.lora.backends.torch_backend import TorchLora
from model_runner.lora.backends.torch_bmm import LaneBatch, LaneTokens
from model_runner.lora.backends.torch_cpu import DeltaKernel, DeltaPlan, plan_delta
from model_runner.lora.pool.pages import RankPagePool
from model_runner.lora.site import Site, vectors_of

CPU = torch.device("cpu")
SITES = random_sites()
GROUPS = ("qkv", "o", "gate_up", "down")
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ADAPTERS = {
    1: random_adapter(SITES, 1, dict.fromkeys(ALL, 8)),
    2: with_vectors(random_adapter(SITES, 2, {"q_proj": 16, "v_proj": 3, "down_proj": 16}), SITES),
    3: random_adapter(SITES, 3, {"k_proj": 40, "down_proj": 1}),
    4: random_adapter(SITES, 4, {"gate_proj": 20, "o_proj": 17}, layers={1}),
}
MIXES: list[dict[int, float]] = [
    {1: 1.0},
    {2: 1.0},
    {3: 1.0},
    {4: 1.0},
    {1: 0.5, 2: -1.25},
    {3: 2.0, 4: -0.5},
    {1: 0.0},
]
"""The adapters of lanes 1, 2, ..., each with its scale."""


class Eager(KernelSet):
    """Returns the kernels' torch references and records every call. Kernels in `missing` are not built yet."""

    def __init__(self, missing: Collection[KernelKey] = ()) -> None:
        super().__init__("before_serving")
        self.missing = set(missing)
        self.calls: list[tuple[KernelKey, list[torch.Tensor]]] = []

    def get(self, key: KernelKey) -> Kernel | None:
        if key in self.missing:
            return None
        reference = spec_for(key).reference

        def kernel(*arguments: Argument) -> None:
            self.calls.append((key, [tensor for tensor in arguments if isinstance(tensor, torch.Tensor)]))
            assert all(tensor.is_contiguous() for tensor in self.calls[-1][1])
            reference(*arguments)

        return kernel


def backend(kernels: KernelSet | None = None, dtype: torch.dtype = torch.float32) -> TorchLora:
    """Returns a backend with the adapters in scattered pages and a lane for each mix."""
    counts = dict.fromkeys(GROUPS, 12) | {vectors_of(group): 2 for group in GROUPS}
    random = np.random.default_rng(1)
    free = {group: random.permutation(count).tolist() for group, count in counts.items()}
    pages = RankPagePool(SITES, counts, len(MIXES), dtype, CPU)
    granted: dict[int, dict[str, list[int]]] = {}
    for number, adapter in ADAPTERS.items():
        granted[number] = {group: [free[group].pop() for _ in range(n)] for group, n in adapter.footprint.pages.items()}
        pages.fill(adapter, granted[number])
    for lane, mix in enumerate(MIXES, start=1):
        table: dict[str, list[tuple[int, float]]] = {}
        for number, scale in mix.items():
            for group, held in granted[number].items():
                table.setdefault(group, []).extend((page, scale) for page in held)
        pages.set_lane(LanePages(lane, table))
    lora = TorchLora(pages)
    if kernels is not None:
        lora.use_kernels(kernels)
    return lora


def inputs(tokens: int, site: Site) -> torch.Tensor:
    return torch.randn(tokens, site.in_features, generator=torch.Generator().manual_seed(tokens))


def check(lora: TorchLora, chunks: list[tuple[int, int]]) -> None:
    """Checks every site against dense arithmetic in float64, chunk by chunk."""
    meta = lora.plan(layout(chunks))
    for site in SITES:
        x, begin = inputs(sum(length for _, length in chunks), site), 0
        y = x.double() @ site.base.weight.double().t() + (0 if site.base.bias is None else site.base.bias.double())
        for lane, length in chunks:
            here = slice(begin, begin + length)
            for number, scale in (MIXES[lane - 1] if lane else {}).items():
                y[here] += scale * changed(ADAPTERS[number], site, x[here])
            begin += length
        torch.testing.assert_close(compute(lora, site, x, meta).double(), y, atol=2e-4, rtol=2e-4)


def test_plan_lists_lanes_then_rows_and_pages() -> None:
    tokens = plan_delta(
        [
            LaneTokens(np.array([0, 7]), [(3, 1.0), (9, 1.5)]),
            LaneTokens(np.array([5]), [(8, 0.5)]),
            LaneTokens(np.array([1, 2, 3]), [(9, 2.0), (4, 1.0), (0, -0.25)]),
        ]
    )
    assert tokens.plan.tolist() == [3, 2, 2, 1, 1, 3, 3, *(0, 7, 5, 1, 2, 3), *(3, 9, 8, 9, 4, 0)]
    assert tokens.scales_q.tolist() == [1, 1.5, 0.5, 2, 1, -0.25]
    assert tokens.numbers == (0, 3, 4, 8, 9, 9)
    assert (tokens.plan.dtype, tokens.scales_q.dtype) == (torch.int64, torch.float32)


def test_all_lanes_of_a_group_are_one_plan() -> None:
    lora = backend(Eager())
    meta = lora.plan(layout([(1, 2), (3, 40), (0, 3), (2, 1), (6, 33), (1, 30), (7, 1), (5, 1)]))
    assert meta is not None
    (part,) = meta["qkv"]
    assert isinstance(part, DeltaPlan)
    lanes, *counts = part.plan[:11].tolist()
    assert lanes == 5  # lane 7 has scale 0
    assert counts == [*(32, 1), *(1, 1), *(40, 3), *(1, 2), *(33, 3)]
    assert part.plan[11:43].tolist() == [0, 1, *range(79, 109)]  # lane 1 in both its chunks
    assert [type(part) for part in meta[vectors_of("qkv")]] == [LaneBatch]


def test_lane_batches_are_used_without_kernels() -> None:
    never = KernelSet("never")
    for lora in (backend(), backend(never), backend(KernelSet("background"))):
        meta = lora.plan(layout([(1, 2), (2, 1), (6, 3)]))
        assert meta is not None
        assert {type(part) for parts in meta.values() for part in parts} == {LaneBatch}


def test_kernel_compiled_later_is_used_from_the_next_step() -> None:
    kernels = Eager({KernelKey("delta", "float32")})
    lora = backend(kernels)
    chunks = [(1, 2), (4, 1)]

    def kinds() -> set[type]:
        meta = lora.plan(layout(chunks))
        assert meta is not None
        return {type(part) for group in GROUPS for part in meta[group]}

    assert kinds() == {LaneBatch}
    check(lora, chunks)
    assert kernels.calls == []
    kernels.missing.clear()
    assert kinds() == {DeltaPlan}
    check(lora, chunks)
    assert kernels.calls


def test_untouched_sites_call_no_kernel() -> None:
    kernels = Eager()
    lora = backend(kernels)
    meta = lora.plan(layout([(4, 1)]))
    assert meta is not None
    assert isinstance(meta["gate_up"][0], DeltaPlan)
    for site in SITES:
        kernels.calls.clear()
        compute(lora, site, inputs(1, site), meta)
        assert len(kernels.calls) == (site.layer == 1 and site.group in ("gate_up", "o"))


def test_pool_is_passed_without_a_copy() -> None:
    kernels = Eager()
    lora = backend(kernels)
    site = SITES[0]
    pool = lora.pages.pools[site.name]
    wide = inputs(3, site).repeat(1, 2)
    x = wide[:, : site.in_features]
    assert not x.is_contiguous()
    y = compute(lora, site, x, lora.plan(layout([(1, 3)])))
    ((_, (given_y, given_x, a, b, *_)),) = kernels.calls
    assert (a.data_ptr(), b.data_ptr(), given_y.data_ptr()) == (
        pool.a_PSRI.data_ptr(),
        pool.b_PRO.data_ptr(),
        y.data_ptr(),
    )
    assert torch.equal(given_x, x)


def test_wanted_kernels_by_dtype() -> None:
    for dtype, name in ((torch.float32, "float32"), (torch.bfloat16, "bfloat16")):
        deltas = DeltaKernel(RankPagePool(SITES, {"down": 1}, 1, dtype, CPU))
        assert deltas.wanted_kernels(dtype) == [KernelKey("delta", name)]
    assert DeltaKernel(backend().pages).wanted_kernels(torch.bfloat16) == []
    assert DeltaKernel(RankPagePool(SITES, {}, 1, torch.float32, CPU)).wanted_kernels(torch.float32) == []
    assert DeltaKernel(RankPagePool(SITES, {"down": 1}, 1, torch.float16, CPU)).wanted_kernels(torch.float16) == []


STEPS = {
    "one token": [(1, 1)],
    "one lane in pieces": [(2, 3), (0, 2), (2, 1)],
    "decodes": [(0, 1), (1, 1), (2, 1), (1, 1), (3, 1), (0, 1), (4, 1), (5, 1), (6, 1)],
    "beside prefills": [(1, 32), (3, 33), (2, 1), (5, 70), (0, 4), (6, 2)],
    "scale 0": [(7, 2), (1, 1)],
}


@pytest.mark.parametrize("step", STEPS)
def test_steps_equal_float64(step: str) -> None:
    check(backend(Eager()), STEPS[step])


EAGER = Eager()
LORA = backend(EAGER)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, len(MIXES)), st.sampled_from([1, 1, 1, 2, 5, 40])), min_size=1, max_size=10))
def test_any_step_equals_float64(chunks: list[tuple[int, int]]) -> None:
    EAGER.calls.clear()
    check(LORA, chunks)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 3e38])
def test_poisoned_row_leaves_all_others_bit_equal(poison: float) -> None:
    chunks = [(1, 1), (2, 2), (0, 1), (3, 1), (5, 1)]
    lora = backend(Eager())
    meta = lora.plan(layout(chunks))
    for site in SITES:
        for row in range(6):
            x = inputs(6, site)
            clean = compute(lora, site, x, meta)
            x[row] = poison
            others = [index for index in range(6) if index != row]
            assert torch.equal(compute(lora, site, x, meta)[others], clean[others])


def test_largest_weights_leave_other_lanes_bit_equal() -> None:
    chunks = [(1, 1), (2, 2), (0, 1), (3, 1), (1, 1)]
    lanes = np.repeat(*np.array(chunks).T)
    lora = backend(Eager())
    meta = lora.plan(layout(chunks))
    clean = {site.name: compute(lora, site, inputs(6, site), meta) for site in SITES}
    for page, _ in lora.pages.lanes[2]["qkv"]:
        for site in SITES:
            if site.group == "qkv":
                lora.pages.pools[site.name].a_PSRI[page] = torch.finfo(torch.float32).max
                lora.pages.pools[site.name].b_PRO[page] = torch.nan
    for site in SITES:
        y = compute(lora, site, inputs(6, site), meta)
        assert torch.equal(y[lanes != 2], clean[site.name][lanes != 2])
        assert torch.isfinite(y[lanes == 2]).all() == (site.group != "qkv")
