"""What it takes to call a kernel right: shapes, values, and what a function writes to."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from model_runner.compiled.program import Draw, Kernel, Program, differs


class AddInto(nn.Module):
    """Writes to its first argument; gives the largest of the second."""

    def forward(self, into: torch.Tensor, what: torch.Tensor) -> tuple[torch.Tensor, ...]:
        into += what
        return (what.max(),)


def arguments(size: int) -> tuple[torch.Tensor, ...]:
    draw = Draw(torch.bfloat16)
    first = draw(size, 5)
    first[0, 0] = -torch.inf
    return first, draw(size, 5)


PROGRAM = Program(AddInto(), arguments, ({0: "T"}, {0: "T"}), sizes=(1, 4))


def test_the_same_is_right() -> None:
    assert differs(lambda given: list(PROGRAM.module(*given)), PROGRAM) == ""


WRONG: list[tuple[Kernel, str]] = [
    (lambda given: [given[1].max()], "off by"),  # nothing is written
    (lambda given: [given[1].min() - 1, given[0].add_(given[1])][:1], "off by"),
    (lambda given: [], "[] instead of [()]"),
    (lambda given: [PROGRAM.module(*given)[0].float()], "instead of"),
    (lambda given: [PROGRAM.module(*given)[0] * torch.nan], "off by nan"),
]


@pytest.mark.parametrize(("kernel", "words"), WRONG)
def test_another_is_not(kernel: Kernel, words: str) -> None:
    assert words in differs(kernel, PROGRAM)


def test_a_draw_is_the_same_everywhere_and_leaves_torchs_own_alone() -> None:
    state = torch.get_rng_state()
    assert torch.equal(Draw(torch.float32)(3, 2), Draw(torch.float32)(3, 2))
    assert torch.equal(state, torch.get_rng_state())
