"""C++ of our own: built, called, and held against torch in every way it can be compiled; a row alone and in company."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from model_runner.compiled import compiler, native
from model_runner.compiled.functions import FUNCTIONS
from model_runner.compiled.program import Function, Kernel, Program, differs

COMPILER = compiler.find_compiler()
WAYS = {"float32": (), "bfloat16": ("BFLOAT16",), "bfloat16 one by one": ("BFLOAT16", "NO_PAIRS")}

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


def build(name: str, way: str, directory: Path) -> tuple[Program, Kernel]:
    program, library = FUNCTIONS[name](Function(name, (), way.split()[0])), directory / f"{name}.so"
    assert program.source is not None
    assert COMPILER is not None
    native.build(COMPILER, program.source, WAYS[way], library)
    return program, compiler.load(library, program)


@pytest.fixture(scope="module", params=WAYS)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Program, Kernel]:
    """The delta."""
    return build("delta", request.param, tmp_path_factory.mktemp("delta"))


@pytest.fixture(scope="module", params=WAYS)
def attending(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Program, Kernel]:
    """The decodes."""
    return build("decodes", request.param, tmp_path_factory.mktemp("decodes"))


def test_deltas_are_what_torch_computes(built: tuple[Program, Kernel]) -> None:
    program, kernel = built
    assert differs(kernel, program) == ""


def test_decodes_are_what_torch_computes(attending: tuple[Program, Kernel]) -> None:
    program, kernel = attending
    assert differs(kernel, program) == ""


def test_the_trial_sees_what_is_not_written(built: tuple[Program, Kernel], attending: tuple[Program, Kernel]) -> None:
    for program, _ in (built, attending):
        assert "off by" in differs(lambda given: [], program)


def test_each_row_alone_gives_the_same_bits_as_all_together(attending: tuple[Program, Kernel]) -> None:
    program, kernel = attending
    for size in program.sizes:
        q, k, v, out, sizes, scale, plan = program.arguments(size)
        together, apart = out.clone(), out.clone()
        kernel([q, k, v, together, sizes, scale, plan])
        rows = int(plan[0])
        tokens, stops, slots = torch.split(plan[1:], [rows, rows, len(plan) - 1 - 2 * rows])
        for token, begin, stop in zip(tokens, [0, *stops.tolist()], stops.tolist(), strict=False):
            alone = torch.cat([torch.tensor([1]), token[None], torch.tensor([stop - begin]), slots[begin:stop]])
            kernel([q, k, v, apart, sizes, scale, alone])
        assert torch.equal(apart, together)
        assert torch.equal(together[0], out[0])  # nobody's


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 3e38])
def test_a_poisoned_row_of_decodes_leaves_all_others_bit_equal(
    attending: tuple[Program, Kernel], poison: float
) -> None:
    program, kernel = attending
    q, k, v, out, sizes, scale, plan = program.arguments(7)
    clean, spoiled = out.clone(), out.clone()
    kernel([q, k, v, clean, sizes, scale, plan])
    q[3] = poison
    kernel([q, k, v, spoiled, sizes, scale, plan])
    others = [row for row in range(len(out)) if row != 3]
    assert torch.equal(spoiled[others], clean[others])
    if poison != 3e38:
        assert torch.isnan(spoiled[3]).any()


def test_each_lane_alone_gives_the_same_bits_as_all_together(built: tuple[Program, Kernel]) -> None:
    program, kernel = built
    for size in program.sizes:
        y, x, a, b, units, site, plan, scales = program.arguments(size)
        together = y.clone()
        kernel([together, x, a, b, units, site, plan, scales])
        lanes, apart = int(plan[0]), y.clone()
        tokens, uses = plan[1 : 1 + 2 * lanes : 2].tolist(), plan[2 : 1 + 2 * lanes : 2].tolist()
        rows, pages = torch.split(plan[1 + 2 * lanes :], [sum(tokens), sum(uses)])
        for row, page, scale in zip(
            torch.split(rows, tokens), torch.split(pages, uses), torch.split(scales, uses), strict=True
        ):
            for one in row:  # each token by itself
                alone = torch.cat([torch.tensor([1, 1, len(page)]), one[None], page])
                kernel([apart, x, a, b, units, site, alone, scale.contiguous()])
        assert torch.equal(apart, together)
        others = torch.ones(len(y), dtype=torch.bool)
        others[rows] = False
        assert torch.equal(together[others], y[others])


def test_what_does_not_compile_says_why(tmp_path: Path) -> None:
    source = tmp_path / "wrong.cpp"
    source.write_text('extern "C" void run(float* y) { y = nothing; }\n')
    assert COMPILER is not None
    with pytest.raises(native.BuildError, match="nothing"):
        native.build(COMPILER, source, (), tmp_path / "wrong.so")
