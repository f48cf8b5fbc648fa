"""scheduler.batching.overlap_tuner on simulated machines: what the tuner decides, when, and what its trials cost."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from scheduler.batching.overlap_tuner import (
    COUNTED_STEPS,
    FIRST_PAUSE,
    LEAST_GAIN,
    LONGEST_PAUSE,
    MOST_GAIN,
    SETTLING_STEPS,
    OverlapTuner,
)

BLOCK = SETTLING_STEPS + COUNTED_STEPS
PAIR = 2 * BLOCK


class Machine:
    """A simulated runner: a step takes `early` seconds if it was planned early, else `waited`, with some noise."""

    def __init__(self, waited: float, early: float, computed: float, noise: float = 0.0, seed: int = 0) -> None:
        self.waited, self.early, self.computed = waited, early, computed
        self._noise, self._random = noise, random.Random(seed)

    def steps(self, tuner: OverlapTuner, count: int, rows: int = 1, prompt: int = 0) -> list[bool]:
        """Runs `count` steps. Returns, for each step, whether it was planned early."""
        modes = []
        for _ in range(count):
            modes.append(tuner.pays)
            period = self.early if modes[-1] else self.waited
            period *= self._random.lognormvariate(0, self._noise)
            tuner.step_took(rows, prompt, period, min(period, self.computed))
        return modes


def mostly(modes: list[bool], pays: bool) -> bool:
    """Returns whether at least 90% of the steps were in mode `pays`, so that the other mode was only tried."""
    return modes.count(not pays) < 0.1 * len(modes)


def costing(noise: float = 0.0, seed: int = 0) -> Machine:
    """Returns a machine on which planning early makes the steps longer, as with few CPU cores."""
    return Machine(0.0100, 0.0107, 0.0085, noise, seed)


def gaining(noise: float = 0.0, seed: int = 0) -> Machine:
    """Returns a machine on which planning early saves all time outside the computation."""
    return Machine(0.0022, 0.0018, 0.0018, noise, seed)


def test_tuner_tries_both_modes_in_alternating_order() -> None:
    modes = costing().steps(OverlapTuner(), 4 * BLOCK)
    assert modes == [False] * BLOCK + [True] * 2 * BLOCK + [False] * BLOCK


@pytest.mark.parametrize("rows", [1, 30])
@pytest.mark.parametrize(("make", "pays"), [(costing, False), (gaining, True)])
def test_tuner_keeps_the_faster_mode_and_rarely_tries_the_other(
    make: Callable[[], Machine], pays: bool, rows: int
) -> None:
    tuner, machine = OverlapTuner(), make()
    machine.steps(tuner, 12 * PAIR, rows)
    assert mostly(machine.steps(tuner, 2 * LONGEST_PAUSE, rows), pays)
    modes = machine.steps(tuner, 10 * LONGEST_PAUSE, rows)
    other = modes.count(not pays)
    assert 9 * PAIR / 2 <= other <= 11 * PAIR / 2, "one pair of blocks after each pause"


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("make", "pays"), [(costing, False), (gaining, True)])
def test_tuner_is_not_misled_by_steps_that_vary_by_half(
    make: Callable[[float, int], Machine], pays: bool, seed: int
) -> None:
    tuner, machine = OverlapTuner(), make(0.4, seed)
    machine.steps(tuner, 60 * PAIR)
    modes = machine.steps(tuner, 20_000)
    assert modes.count(pays) > 0.96 * len(modes)


def test_tuner_plans_late_where_the_gain_is_small() -> None:
    tuner, machine = OverlapTuner(), Machine(0.0100, 0.0100 * (1 - LEAST_GAIN / 2), 0.0090)
    machine.steps(tuner, 50 * PAIR)
    assert machine.steps(tuner, FIRST_PAUSE) == [False] * FIRST_PAUSE


def test_tuner_tries_nothing_where_nothing_can_be_hidden() -> None:
    tuner, machine = OverlapTuner(), Machine(0.2, 0.1, 0.2 * (1 - LEAST_GAIN / 2))
    assert not any(machine.steps(tuner, 3 * LONGEST_PAUSE))
    machine.computed = 0.1  # from now on half of the step can be hidden
    assert any(machine.steps(tuner, PAIR))


def test_tuner_notices_a_machine_that_changes() -> None:
    tuner = OverlapTuner()
    for make, pays in ((gaining, True), (costing, False), (gaining, True)):
        make().steps(tuner, LONGEST_PAUSE + 30 * PAIR)
        assert make().steps(tuner, LONGEST_PAUSE).count(pays) >= LONGEST_PAUSE - PAIR / 2


def test_tuner_tries_more_pairs_after_one_that_disagrees() -> None:
    tuner, machine = OverlapTuner(), gaining()
    while not all(machine.steps(tuner, PAIR)):
        pass
    while tuner.pays:
        machine.steps(tuner, 1)
    stalled = Machine(0.0022, 0.0220, 0.0018)
    while not tuner.pays:
        machine.steps(tuner, 1)
    stalled.steps(tuner, BLOCK)
    modes = machine.steps(tuner, LONGEST_PAUSE)
    assert 1 < modes.count(False) / BLOCK < 8, "some more pairs"
    assert mostly(modes[-LONGEST_PAUSE // 2 :], pays=True)


def test_each_load_has_its_own_evidence() -> None:
    tuner, few, many = OverlapTuner(), gaining(), costing()
    few.steps(tuner, 12 * PAIR, rows=1)
    many.steps(tuner, 16 * PAIR, rows=30)
    few.steps(tuner, 100, rows=1)
    assert all(few.steps(tuner, 100, rows=1))
    many.steps(tuner, 100, rows=30)
    assert not any(many.steps(tuner, 100, rows=30))


def test_load_that_varies_a_little_is_one_load() -> None:
    tuner, machine = OverlapTuner(), costing()
    for n in range(12 * PAIR):
        machine.steps(tuner, 1, rows=28 + n * 7 % 9)
    assert mostly([machine.steps(tuner, 1, rows=28 + n * 7 % 9)[0] for n in range(500)], pays=False)


def test_emptier_steps_count_as_slower() -> None:
    """Early steps that are 10% shorter, but produce 28 tokens instead of 33, count as a loss."""
    tuner, modes = OverlapTuner(), []
    for _ in range(60 * PAIR):
        modes.append(tuner.pays)
        tuner.step_took(28 if modes[-1] else 33, 0, 0.0090 if modes[-1] else 0.0100, 0.0090)
    assert modes.count(True) < 20 * PAIR / 2


def test_one_pair_adds_a_limited_amount_of_evidence() -> None:
    tuner, machine = OverlapTuner(), Machine(0.0100, 0.0010, 0.0010)
    machine.steps(tuner, int(1.5 / MOST_GAIN) * PAIR - BLOCK)
    assert set(machine.steps(tuner, BLOCK)) == {False}, "the last block before the evidence is clear"
    assert all(machine.steps(tuner, FIRST_PAUSE))


def test_prompt_steps_are_compared_with_prompt_steps() -> None:
    """Early blocks contain twice as many prompts and so take longer in total, though each kind of step is faster."""
    tuner, modes = OverlapTuner(), []
    for n in range(60 * PAIR):
        early = tuner.pays
        modes.append(early)
        prompt = 100 if n % (3 if early else 6) == 0 else 0
        period = (0.030 if prompt else 0.010) * (0.8 if early else 1)
        tuner.step_took(8, prompt, period, 0.8 * period)
    assert all(modes[-10 * PAIR :])


def test_stall_is_no_evidence() -> None:
    """One step of an early block takes a second; the tuner does not count it against planning early."""
    tuner, machine = OverlapTuner(), gaining()
    machine.steps(tuner, 2 * PAIR)
    while not tuner.pays:
        machine.steps(tuner, 1)
    machine.steps(tuner, SETTLING_STEPS + 2)
    tuner.step_took(1, 0, 1.0, 0.9)
    machine.steps(tuner, 10 * PAIR)
    assert mostly(machine.steps(tuner, LONGEST_PAUSE // 2), pays=True)
