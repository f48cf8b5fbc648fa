"""What it takes to call a kernel right: shapes, values, and what a function writes to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from model_runner.compute.kernels.cpu.functions.program import Argument, Draw, Program, differs


def add_into(into: torch.Tensor, what: torch.Tensor, factor: float) -> None:
    into += what * factor


def arguments(size: int) -> tuple[Argument, ...]:
    draw = Draw(torch.bfloat16)
    first = draw(size, 5)
    first[0, 0] = -torch.inf
    return first, draw(size, 5), 2.0


PROGRAM = Program(Path("add.cpp"), add_into, arguments, sizes=(1, 4))


def test_the_same_is_right() -> None:
    assert differs(add_into, PROGRAM) == ""


def add_once(into: torch.Tensor, what: torch.Tensor, factor: float) -> None:
    into += what


def add_and_spoil(into: torch.Tensor, what: torch.Tensor, factor: float) -> None:
    into += what * factor
    what += 1


def add_nothing_that_is_finite(into: torch.Tensor, what: torch.Tensor, factor: float) -> None:
    into *= torch.nan


WRONG: list[tuple[Callable[..., None], str]] = [
    (lambda into, what, factor: None, "at size 1: off by"),
    (add_once, "off by"),
    (add_and_spoil, "off by"),
    (add_nothing_that_is_finite, "off by nan"),
]


@pytest.mark.parametrize(("kernel", "words"), WRONG)
def test_another_is_not(kernel: Callable[..., None], words: str) -> None:
    assert words in differs(kernel, PROGRAM)


def test_only_so_many_sizes_are_tried() -> None:
    def right_at_one(into: torch.Tensor, what: torch.Tensor, factor: float) -> None:
        into += what * (factor if len(into) == 1 else 0)

    assert differs(right_at_one, PROGRAM, tries=1) == ""
    assert "at size 4" in differs(right_at_one, PROGRAM)


def test_a_draw_is_the_same_everywhere_and_leaves_torchs_own_alone() -> None:
    state = torch.get_rng_state()
    assert torch.equal(Draw(torch.float32)(3, 2), Draw(torch.float32)(3, 2))
    assert torch.equal(state, torch.get_rng_state())
