"""The fit of measured steps finds the costs from which the times were computed."""

from __future__ import annotations

import random

import pytest
from measure_profile import FEATURES, Point, fit, line, medians, table


def test_costs_are_found_and_none_is_negative() -> None:
    rng = random.Random(0)
    costs = dict(zip(FEATURES, (0.02, 0.001, 0.0005, 0.0, 0.002, 1e-9), strict=True))
    points = []
    for _ in range(60):
        features = (
            1.0,
            rng.randrange(64),
            rng.randrange(512),
            rng.randrange(9000),
            rng.randrange(8),
            rng.random() * 1e7,
        )
        exact = sum(cost * amount for cost, amount in zip(costs.values(), features, strict=True))
        points.append(Point(features, exact * rng.uniform(0.99, 1.01)))
    found, error = fit(points)
    assert error < 0.01
    for name in ("base", "decode_row", "prefill_token", "lane"):
        assert found[name] == pytest.approx(costs[name], rel=0.1)
    assert min(found.values()) >= 0


def test_lanes_that_all_have_as_many_bytes_cost_by_these() -> None:
    amounts = [(1.0, rows, 0, 0, lanes, lanes * 5e6) for rows in (1, 4, 16) for lanes in (0, 1, rows)]
    points = [Point(step, 0.02 + 0.001 * step[1] + 1e-10 * step[5]) for step in amounts]
    found, error = fit(points)
    assert error < 1e-3
    assert found["lane"] == found["prefill_token"] == found["context_token"] == 0.0
    assert found["lane_byte"] == pytest.approx(1e-10, rel=1e-3)


def test_of_each_kind_of_step_its_median_counts_once() -> None:
    one, other = ((1.0, rows, 0, 64 * rows, 0, 0) for rows in (1, 4))
    kinds = [[Point(other, 0.9)], [Point(one, seconds) for seconds in (0.3, 0.1, 7.0, 0.2, 0.25)]]
    found = medians(kinds)
    assert found == [Point(one, 0.25), Point(other, 0.9)]
    lines = table(found, dict.fromkeys(FEATURES, 0.0) | {"base": 0.05, "decode_row": 0.2}).splitlines()
    assert [line.split() for line in lines[1:]] == [
        ["1", "0", "64", "0", "0.0", "250.0", "250.0"],
        ["4", "0", "256", "0", "0.0", "900.0", "850.0"],
    ]


def test_copies_lie_on_a_line() -> None:
    found = line({4_000_000: [0.006], 1_000_000: [0.9, 0.003, 0.001], 2_000_000: [0.004]})  # 2 ms, plus bytes at 1 GB/s
    assert (found.seconds, found.bytes_per_second) == (pytest.approx(0.002), pytest.approx(1e9))


@pytest.mark.parametrize("seconds", [(0.004, 0.003), (0.001, 0.003)])  # a falling line; a line below 0 at 0 bytes
def test_copies_on_no_line_cost_by_their_bytes(seconds: tuple[float, float]) -> None:
    found = line({1_000_000: [seconds[0]], 2_000_000: [seconds[1]]})
    assert found.seconds == 0.0
    assert 1 / found.bytes_per_second == pytest.approx((seconds[0] / 1e6 + seconds[1] / 2e6) / 2)
