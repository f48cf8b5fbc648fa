"""`compare`, which compares a kernel with its reference: which errors it reports, and at which sizes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from model_runner.compute.kernels.cpu.functions.spec import Argument, KernelSpec, RandomTensors, compare


def add_scaled(out: torch.Tensor, x: torch.Tensor, factor: float) -> None:
    out += x * factor


def arguments(size: int) -> tuple[Argument, ...]:
    random = RandomTensors(torch.bfloat16)
    out = random(size, 5)
    out[0, 0] = -torch.inf
    return out, random(size, 5), 2.0


SPEC = KernelSpec(Path("add.cpp"), add_scaled, arguments, sizes=(1, 4))


def test_compare_accepts_the_reference_itself() -> None:
    assert compare(add_scaled, SPEC) == ""


def add_unscaled(out: torch.Tensor, x: torch.Tensor, factor: float) -> None:
    out += x


def add_and_change_the_input(out: torch.Tensor, x: torch.Tensor, factor: float) -> None:
    out += x * factor
    x += 1


def write_nan(out: torch.Tensor, x: torch.Tensor, factor: float) -> None:
    out *= torch.nan


WRONG: list[tuple[Callable[..., None], str]] = [
    (lambda out, x, factor: None, "at size 1: off by"),
    (add_unscaled, "off by"),
    (add_and_change_the_input, "off by"),
    (write_nan, "off by nan"),
]


@pytest.mark.parametrize(("kernel", "words"), WRONG)
def test_compare_reports_a_wrong_kernel(kernel: Callable[..., None], words: str) -> None:
    assert words in compare(kernel, SPEC)


def test_compare_checks_at_most_the_given_sizes() -> None:
    def right_at_size_one(out: torch.Tensor, x: torch.Tensor, factor: float) -> None:
        out += x * (factor if len(out) == 1 else 0)

    assert compare(right_at_size_one, SPEC, most_sizes=1) == ""
    assert "at size 4" in compare(right_at_size_one, SPEC)


def test_random_tensors_repeat_and_leave_torchs_generator() -> None:
    state = torch.get_rng_state()
    assert torch.equal(RandomTensors(torch.float32)(3, 2), RandomTensors(torch.float32)(3, 2))
    assert torch.equal(state, torch.get_rng_state())
