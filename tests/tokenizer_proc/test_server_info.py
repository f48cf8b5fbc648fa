"""The contents of /server_info."""

from __future__ import annotations

import pytest
from fixtures.serving.tokenizer_front import Fake

from engine.messages import Stats


def test_uptime_is_that_of_a_clock_that_never_jumps(monkeypatch: pytest.MonkeyPatch) -> None:
    front = Fake().front
    monkeypatch.setattr("time.time", lambda: 0.0)
    assert 0 <= front.info()["uptime_seconds"] < 600


def test_step_times_are_left_to_the_metrics() -> None:
    front = Fake().front
    front.handle(Stats(running=2, step_seconds=[0.5, 0.25]))
    assert front.info()["stats"]["running"] == 2
    assert front.info()["stats"]["step_seconds"] == []
