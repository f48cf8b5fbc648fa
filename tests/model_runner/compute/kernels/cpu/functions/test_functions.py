"""The C++ kernels against their torch references, in every variant; and single tokens against the whole batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from model_runner.compute.kernels.cpu.compilation import compiler
from model_runner.compute.kernels.cpu.functions import registry
from model_runner.compute.kernels.cpu.functions.spec import (
    Argument,
    Kernel,
    KernelKey,
    KernelSpec,
    RandomTensors,
    compare,
)

DEFINES = {"float32": (), "bfloat16": ("BFLOAT16",), "bfloat16 without pairs": ("BFLOAT16", "NO_PAIRS")}
"""The macros that are defined for the compiler, by variant; the first word of a variant is the dtype."""

Built = tuple[KernelSpec, Kernel]

pytestmark = pytest.mark.skipif(compiler.find_compiler() is None, reason="no C++ compiler")


@pytest.fixture(scope="module", params=DEFINES)
def build(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Built]:
    """Builds each kernel once, in one of the variants in DEFINES."""
    variant, directory, built = request.param, tmp_path_factory.mktemp("built"), dict[str, Built]()

    def build(name: str) -> Built:
        if name not in built:
            spec, library = registry.spec_for(KernelKey(name, variant.split()[0])), directory / f"{name}.so"
            compiler.build(spec.source, DEFINES[variant], library)
            built[name] = spec, compiler.load(library, spec.arguments(1))
        return built[name]

    return build


@pytest.mark.parametrize("name", registry.SPECS)
def test_kernel_computes_what_torch_does(build: Callable[[str], Built], name: str) -> None:
    spec, kernel = build(name)
    assert compare(kernel, spec) == ""
    assert "off by" in compare(lambda *arguments: None, spec)  # compare sees results that were not written


@pytest.mark.parametrize("name", ["add_norm", "silu_mul", "rope_and_store"])
def test_kernel_rounds_where_torch_rounds(build: Callable[[str], Built], name: str) -> None:
    spec, kernel = build(name)
    for size in spec.sizes:
        expected, got = spec.arguments(size), spec.arguments(size)
        spec.reference(*expected)
        kernel(*got)
        for right, tensor in zip(expected, got, strict=True):
            if isinstance(right, torch.Tensor) and right.dtype is torch.bfloat16:  # a sum may run in another order
                assert (right != tensor).sum() <= right.numel() // 500


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-30, 40.0, -40.0, -90.0, 1e30, -1e30, torch.inf, torch.nan])
def test_gate_of_extreme_values(build: Callable[[str], Built], value: float) -> None:
    spec, kernel = build("silu_mul")
    gate_up = torch.ones(1, 34).to(_tensors(spec.arguments(1))[0].dtype)
    gate_up[0, :17] = value
    out = torch.empty_like(gate_up[:, :17])
    kernel(gate_up, out, 1, 17)
    expected = torch.nn.functional.silu(gate_up[:, :17].double()).to(out.dtype)
    torch.testing.assert_close(out, expected, rtol=2**-7, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize("name", ["add_norm", "silu_mul", "rope_and_store"])
def test_each_token_alone_gives_the_same_bits(build: Callable[[str], Built], name: str) -> None:
    spec, kernel = build(name)
    for size in spec.sizes:
        together = spec.arguments(size)
        kernel(*together)
        for token in range(size):
            arguments = spec.arguments(size)
            cut = [_row(argument, token, size) for argument in _tensors(arguments)]
            numbers = [argument for argument in arguments if not isinstance(argument, torch.Tensor)]
            kernel(*cut, 1, *numbers[1:])  # the first number is the number of tokens
            for whole, one in zip(_tensors(together), cut, strict=True):
                assert torch.equal(_row(whole, token, size), one) or len(whole) == 2 * size  # or it is a cache


def _row(tensor: torch.Tensor, token: int, size: int) -> torch.Tensor:
    return tensor[token : token + 1].clone() if len(tensor) == size else tensor


def test_attention_of_each_token_alone_gives_the_same_bits(build: Callable[[str], Built]) -> None:
    spec, kernel = build("attend")
    for size in spec.sizes:
        q, k, v, out, plan, *sizes = spec.arguments(size)
        assert isinstance(plan, torch.Tensor)
        assert isinstance(out, torch.Tensor)
        together, apart = out.clone(), out.clone()
        kernel(q, k, v, together, plan, *sizes)
        rows = int(plan[0])
        firsts, lengths, stops, slots = torch.split(plan[1:], [rows, rows, rows, len(plan) - 1 - 3 * rows])
        begins = [0, *stops.tolist()]
        for first, length, begin, stop in zip(firsts, lengths, begins, stops.tolist(), strict=False):
            for token in range(int(length)):
                seen = stop - begin - int(length) + token + 1
                alone = torch.cat([torch.tensor([1, int(first) + token, 1, seen]), slots[begin : begin + seen]])
                kernel(q, k, v, apart, alone, *sizes)
        assert torch.equal(apart, together)
        assert torch.equal(together[0], out[0])  # a token that is in no row is not written


@pytest.mark.parametrize(("lengths", "before"), [((700, 1), 50), ((33, 200, 1, 64), 50), ((20,), 40_000)])
def test_long_chunks_are_cut_into_tasks(build: Callable[[str], Built], lengths: tuple[int, ...], before: int) -> None:
    spec, kernel = build("attend")
    random = RandomTensors(_tensors(spec.arguments(1))[0].dtype)
    tokens, heads, kv_heads, size = sum(lengths), 8, 1, 32
    q, out = (random(tokens, heads, size) for _ in range(2))
    k, v = (random(2000, kv_heads, size) for _ in range(2))
    lengths_C = torch.tensor(lengths)
    stops_C = (lengths_C + before).cumsum(0)
    slots = torch.arange(int(stops_C[-1])) * 7 % 2000
    plan = torch.cat([torch.tensor([len(lengths)]), lengths_C.cumsum(0) - lengths_C, lengths_C, stops_C, slots])
    sizes = heads, kv_heads, size, size**-0.5
    expected, summed = out.clone(), out.clone()
    spec.reference(q, k, v, expected, plan, *sizes)
    spec.reference(
        q, k, v.abs(), summed, plan, *sizes
    )  # the size of what is summed: positive and negative parts may cancel
    kernel(q, k, v, out, plan, *sizes)
    near = 1e-5 if out.dtype is torch.float32 else 2**-7
    torch.testing.assert_close(out, expected, rtol=0, atol=near * float(summed.max()))


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 3e38])
def test_poisoned_query_leaves_other_tokens_bit_equal(build: Callable[[str], Built], poison: float) -> None:
    spec, kernel = build("attend")
    q, k, v, out, *rest = spec.arguments(7)
    assert isinstance(q, torch.Tensor)
    assert isinstance(out, torch.Tensor)
    clean, spoiled = out.clone(), out.clone()
    kernel(q, k, v, clean, *rest)
    q[3] = poison
    kernel(q, k, v, spoiled, *rest)
    others = [row for row in range(len(out)) if row != 3]
    assert torch.equal(spoiled[others], clean[others])
    if poison != 3e38:
        assert torch.isnan(spoiled[3]).any()


def test_delta_of_each_lane_alone_gives_the_same_bits(build: Callable[[str], Built]) -> None:
    spec, kernel = build("delta")
    for size in spec.sizes:
        y, x, a, b, units, site, plan, scales = _tensors(spec.arguments(size))
        together = y.clone()
        kernel(together, x, a, b, units, site, plan, scales)
        lanes, apart = int(plan[0]), y.clone()
        tokens, uses = plan[1 : 1 + 2 * lanes : 2].tolist(), plan[2 : 1 + 2 * lanes : 2].tolist()
        rows, pages = torch.split(plan[1 + 2 * lanes :], [sum(tokens), sum(uses)])
        for row, page, scale in zip(
            torch.split(rows, tokens), torch.split(pages, uses), torch.split(scales, uses), strict=True
        ):
            for one in row:  # each token by itself
                alone = torch.cat([torch.tensor([1, 1, len(page)]), one[None], page])
                kernel(apart, x, a, b, units, site, alone, scale.contiguous())
        assert torch.equal(apart, together)
        others = torch.ones(len(y), dtype=torch.bool)
        others[rows] = False
        assert torch.equal(together[others], y[others])


def test_build_error_quotes_the_compiler(tmp_path: Path) -> None:
    source = tmp_path / "wrong.cpp"
    source.write_text('extern "C" void run(float* y) { y = nothing; }\n')
    with pytest.raises(compiler.BuildError, match="nothing"):
        compiler.build(source, (), tmp_path / "wrong.so")


def _tensors(arguments: tuple[Argument, ...]) -> list[torch.Tensor]:
    return [argument for argument in arguments if isinstance(argument, torch.Tensor)]
