"""C++ of our own: built, called, and held against torch in every way it can be compiled; a row alone and in company."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from model_runner.compute.kernels.cpu.compilation import compiler
from model_runner.compute.kernels.cpu.functions import registry
from model_runner.compute.kernels.cpu.functions.program import Argument, Draw, Function, Kernel, Program, differs

WAYS = {"float32": (), "bfloat16": ("BFLOAT16",), "bfloat16 one by one": ("BFLOAT16", "NO_PAIRS")}

Built = tuple[Program, Kernel]

pytestmark = pytest.mark.skipif(compiler.find_compiler() is None, reason="no C++ compiler")


@pytest.fixture(scope="module", params=WAYS)
def build(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Built]:
    """Builds a function in one of the ways, once."""
    way, directory, known = request.param, tmp_path_factory.mktemp("built"), dict[str, Built]()

    def build(name: str) -> Built:
        if name not in known:
            program, library = registry.program(Function(name, way.split()[0])), directory / f"{name}.so"
            compiler.build(program.source, WAYS[way], library)
            known[name] = program, compiler.load(library, program.arguments(1))
        return known[name]

    return build


@pytest.mark.parametrize("name", registry.FUNCTIONS)
def test_it_is_what_torch_computes(build: Callable[[str], Built], name: str) -> None:
    program, kernel = build(name)
    assert differs(kernel, program) == ""
    assert "off by" in differs(lambda *given: None, program)  # the trial sees what is not written


@pytest.mark.parametrize("name", ["add_norm", "silu_mul", "rope_and_store"])
def test_it_rounds_where_torch_rounds(build: Callable[[str], Built], name: str) -> None:
    program, kernel = build(name)
    for size in program.sizes:
        wanted, got = program.arguments(size), program.arguments(size)
        program.reference(*wanted)
        kernel(*got)
        for mine, other in zip(wanted, got, strict=True):
            if isinstance(mine, torch.Tensor) and mine.dtype is torch.bfloat16:  # a sum may run in another order
                assert (mine != other).sum() <= mine.numel() // 500


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-30, 40.0, -40.0, -90.0, 1e30, -1e30, torch.inf, torch.nan])
def test_the_gate_at_the_ends(build: Callable[[str], Built], value: float) -> None:
    program, kernel = build("silu_mul")
    gate_up = torch.ones(1, 34).to(_tensors(program.arguments(1))[0].dtype)
    gate_up[0, :17] = value
    out = torch.empty_like(gate_up[:, :17])
    kernel(gate_up, out, 1, 17)
    wanted = torch.nn.functional.silu(gate_up[:, :17].double()).to(out.dtype)
    torch.testing.assert_close(out, wanted, rtol=2**-7, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize("name", ["add_norm", "silu_mul", "rope_and_store"])
def test_each_token_alone_gives_the_same_bits(build: Callable[[str], Built], name: str) -> None:
    program, kernel = build(name)
    for size in program.sizes:
        together = program.arguments(size)
        kernel(*together)
        for token in range(size):
            given = program.arguments(size)
            cut = [_row(argument, token, size) for argument in _tensors(given)]
            numbers = [argument for argument in given if not isinstance(argument, torch.Tensor)]
            kernel(*cut, 1, *numbers[1:])  # the first is how many tokens there are
            for whole, one in zip(_tensors(together), cut, strict=True):
                assert torch.equal(_row(whole, token, size), one) or len(whole) == 2 * size  # caches


def _row(tensor: torch.Tensor, token: int, size: int) -> torch.Tensor:
    return tensor[token : token + 1].clone() if len(tensor) == size else tensor


def test_each_token_alone_is_attended_to_the_same_bits_as_all_together(build: Callable[[str], Built]) -> None:
    program, kernel = build("attend")
    for size in program.sizes:
        q, k, v, out, plan, *sizes = program.arguments(size)
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
        assert torch.equal(together[0], out[0])  # nobody's


@pytest.mark.parametrize(("lengths", "before"), [((700, 1), 50), ((33, 200, 1, 64), 50), ((20,), 40_000)])
def test_long_chunks_are_cut_into_tasks(build: Callable[[str], Built], lengths: tuple[int, ...], before: int) -> None:
    program, kernel = build("attend")
    draw = Draw(_tensors(program.arguments(1))[0].dtype)
    tokens, heads, kv_heads, size = sum(lengths), 8, 1, 32
    q, out = (draw(tokens, heads, size) for _ in range(2))
    k, v = (draw(2000, kv_heads, size) for _ in range(2))
    lengths_C = torch.tensor(lengths)
    stops_C = (lengths_C + before).cumsum(0)
    slots = torch.arange(int(stops_C[-1])) * 7 % 2000
    plan = torch.cat([torch.tensor([len(lengths)]), lengths_C.cumsum(0) - lengths_C, lengths_C, stops_C, slots])
    sizes = heads, kv_heads, size, size**-0.5
    wanted, summed = out.clone(), out.clone()
    program.reference(q, k, v, wanted, plan, *sizes)
    program.reference(q, k, v.abs(), summed, plan, *sizes)  # what is summed: its parts may cancel out
    kernel(q, k, v, out, plan, *sizes)
    near = 1e-5 if out.dtype is torch.float32 else 2**-7
    torch.testing.assert_close(out, wanted, rtol=0, atol=near * float(summed.max()))


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 3e38])
def test_a_poisoned_token_leaves_all_others_bit_equal(build: Callable[[str], Built], poison: float) -> None:
    program, kernel = build("attend")
    q, k, v, out, *rest = program.arguments(7)
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


def test_each_lane_alone_gives_the_same_bits_as_all_together(build: Callable[[str], Built]) -> None:
    program, kernel = build("delta")
    for size in program.sizes:
        y, x, a, b, units, site, plan, scales = _tensors(program.arguments(size))
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


def test_what_does_not_compile_says_why(tmp_path: Path) -> None:
    source = tmp_path / "wrong.cpp"
    source.write_text('extern "C" void run(float* y) { y = nothing; }\n')
    with pytest.raises(compiler.BuildError, match="nothing"):
        compiler.build(source, (), tmp_path / "wrong.so")


def _tensors(arguments: tuple[Argument, ...]) -> list[torch.Tensor]:
    return [argument for argument in arguments if isinstance(argument, torch.Tensor)]
