"""The fit of measured steps finds the costs that made them."""

from __future__ import annotations

import random

import pytest
from measure_profile import FEATURES, Point, fit, line


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


def test_copies_lie_on_a_line() -> None:
    found = line([1e6, 2e6, 4e6], [0.003, 0.004, 0.006])
    assert (found.seconds, found.bytes_per_second) == (pytest.approx(0.002), pytest.approx(1e9))
