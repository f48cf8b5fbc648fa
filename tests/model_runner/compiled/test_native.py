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


def program(way: str) -> Program:
    return FUNCTIONS["delta"](Function("delta", (), way.split()[0]))


@pytest.fixture(scope="module", params=WAYS)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Program, Kernel]:
    wanted, library = program(request.param), tmp_path_factory.mktemp("native") / "delta.so"
    assert wanted.source is not None
    assert COMPILER is not None
    native.build(COMPILER, wanted.source, WAYS[request.param], library)
    return wanted, compiler.load(library, wanted)


def test_it_computes_what_torch_computes(built: tuple[Program, Kernel]) -> None:
    wanted, kernel = built
    assert differs(kernel, wanted) == ""


def test_the_trial_sees_a_delta_that_is_not_added(built: tuple[Program, Kernel]) -> None:
    assert "off by" in differs(lambda given: [], built[0])


def test_each_lane_alone_gives_the_same_bits_as_all_together(built: tuple[Program, Kernel]) -> None:
    wanted, kernel = built
    for size in wanted.sizes:
        y, x, a, b, units, site, plan, scales = wanted.arguments(size)
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
