"""scheduler.batching.overlap_tuner: on made-up machines, what it settles on, when, and what it costs to find out."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from scheduler.batching.overlap_tuner import COUNTED, FIRST_REST, LEAST_GAIN, MOST_GAIN, REST, SETTLING, OverlapTuner

PAIR = 2 * (SETTLING + COUNTED)


class Machine:
    """Steps of a runner: how long they take, waited for and planned early, and how much each may vary."""

    def __init__(self, waited: float, early: float, computed: float, noise: float = 0.0, seed: int = 0) -> None:
        self.waited, self.early, self.computed = waited, early, computed
        self._noise, self._random = noise, random.Random(seed)

    def steps(self, overlap: OverlapTuner, count: int, rows: int = 1, prompt: int = 0) -> list[bool]:
        """Whether each was planned early."""
        modes = []
        for _ in range(count):
            modes.append(overlap.pays)
            period = self.early if modes[-1] else self.waited
            period *= self._random.lognormvariate(0, self._noise)
            overlap.took(rows, prompt, period, min(period, self.computed))
        return modes


def settled(modes: list[bool], pays: bool) -> bool:
    """Whether the other is only tried now and then."""
    return modes.count(not pays) < 0.1 * len(modes)


def costing(noise: float = 0.0, seed: int = 0) -> Machine:
    """Few cores: what is hidden makes the step longer."""
    return Machine(0.0100, 0.0107, 0.0085, noise, seed)


def gaining(noise: float = 0.0, seed: int = 0) -> Machine:
    """What is hidden is hidden."""
    return Machine(0.0022, 0.0018, 0.0018, noise, seed)


def test_both_are_tried_before_it_is_clear_and_the_order_alternates() -> None:
    block = SETTLING + COUNTED
    modes = costing().steps(OverlapTuner(), 4 * block)
    assert modes == [False] * block + [True] * 2 * block + [False] * block


@pytest.mark.parametrize("rows", [1, 30])
@pytest.mark.parametrize(("make", "pays"), [(costing, False), (gaining, True)])
def test_it_settles_on_what_is_faster_and_seldom_tries_the_other(
    make: Callable[[], Machine], pays: bool, rows: int
) -> None:
    overlap, machine = OverlapTuner(), make()
    machine.steps(overlap, 12 * PAIR, rows)
    assert settled(machine.steps(overlap, 2 * REST, rows), pays)
    modes = machine.steps(overlap, 10 * REST, rows)
    other = modes.count(not pays)
    assert 9 * PAIR / 2 <= other <= 11 * PAIR / 2, "one pair of blocks for each rest"


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("make", "pays"), [(costing, False), (gaining, True)])
def test_steps_that_vary_by_half_do_not_mislead_it(
    make: Callable[[float, int], Machine], pays: bool, seed: int
) -> None:
    overlap, machine = OverlapTuner(), make(0.4, seed)
    machine.steps(overlap, 60 * PAIR)
    modes = machine.steps(overlap, 20_000)
    assert modes.count(pays) > 0.96 * len(modes)


def test_a_gain_too_small_is_left() -> None:
    overlap, machine = OverlapTuner(), Machine(0.0100, 0.0100 * (1 - LEAST_GAIN / 2), 0.0090)
    machine.steps(overlap, 50 * PAIR)
    assert machine.steps(overlap, FIRST_REST) == [False] * FIRST_REST


def test_where_nothing_can_be_hidden_nothing_is_tried() -> None:
    overlap, machine = OverlapTuner(), Machine(0.2, 0.1, 0.2 * (1 - LEAST_GAIN / 2))
    assert not any(machine.steps(overlap, 3 * REST))
    machine.computed = 0.1  # from now on something can
    assert any(machine.steps(overlap, PAIR))


def test_a_machine_that_changes_is_noticed() -> None:
    overlap = OverlapTuner()
    for make, pays in ((gaining, True), (costing, False), (gaining, True)):
        make().steps(overlap, REST + 30 * PAIR)
        assert make().steps(overlap, REST).count(pays) >= REST - PAIR / 2


def test_one_pair_that_says_otherwise_is_looked_into_and_does_not_turn_it() -> None:
    overlap, machine = OverlapTuner(), gaining()
    while not all(machine.steps(overlap, PAIR)):
        pass
    while overlap.pays:
        machine.steps(overlap, 1)
    stalled = Machine(0.0022, 0.0220, 0.0018)
    while not overlap.pays:
        machine.steps(overlap, 1)
    stalled.steps(overlap, SETTLING + COUNTED)
    modes = machine.steps(overlap, REST)
    assert 1 < modes.count(False) / (SETTLING + COUNTED) < 8, "some more pairs"
    assert settled(modes[-REST // 2 :], pays=True)


def test_each_load_has_its_own_evidence() -> None:
    overlap, few, many = OverlapTuner(), gaining(), costing()
    few.steps(overlap, 12 * PAIR, rows=1)
    many.steps(overlap, 16 * PAIR, rows=30)
    few.steps(overlap, 100, rows=1)
    assert all(few.steps(overlap, 100, rows=1))
    many.steps(overlap, 100, rows=30)
    assert not any(many.steps(overlap, 100, rows=30))


def test_a_load_that_varies_a_little_is_one_load() -> None:
    overlap, machine = OverlapTuner(), costing()
    for n in range(12 * PAIR):
        machine.steps(overlap, 1, rows=28 + n * 7 % 9)
    assert settled([machine.steps(overlap, 1, rows=28 + n * 7 % 9)[0] for n in range(500)], pays=False)


def test_emptier_steps_are_slower_ones() -> None:
    """Early steps that are shorter by 10%, but bring 28 tokens and not 33, are no gain but a loss."""
    overlap, modes = OverlapTuner(), []
    for _ in range(60 * PAIR):
        modes.append(overlap.pays)
        overlap.took(28 if modes[-1] else 33, 0, 0.0090 if modes[-1] else 0.0100, 0.0090)
    assert modes.count(True) < 20 * PAIR / 2


def test_one_pair_shows_no_more_than_so_much() -> None:
    overlap, machine = OverlapTuner(), Machine(0.0100, 0.0010, 0.0010)
    machine.steps(overlap, int(1.5 / MOST_GAIN) * PAIR - SETTLING - COUNTED)
    assert set(machine.steps(overlap, SETTLING + COUNTED)) == {False}, "the last of what it takes"
    assert all(machine.steps(overlap, FIRST_REST))


def test_prompts_are_seen_against_prompts() -> None:
    """Early blocks with twice as many prompts: longer by far in sum, and yet faster, each kind of step for itself."""
    overlap, modes = OverlapTuner(), []
    for n in range(60 * PAIR):
        early = overlap.pays
        modes.append(early)
        prompt = 100 if n % (3 if early else 6) == 0 else 0
        period = (0.030 if prompt else 0.010) * (0.8 if early else 1)
        overlap.took(8, prompt, period, 0.8 * period)
    assert all(modes[-10 * PAIR :])


def test_a_stall_is_no_evidence() -> None:
    """One step of a second within an early block."""
    overlap, machine = OverlapTuner(), gaining()
    machine.steps(overlap, 2 * PAIR)
    while not overlap.pays:
        machine.steps(overlap, 1)
    machine.steps(overlap, SETTLING + 2)
    overlap.took(1, 0, 1.0, 0.9)
    machine.steps(overlap, 10 * PAIR)
    assert settled(machine.steps(overlap, REST // 2), pays=True)
