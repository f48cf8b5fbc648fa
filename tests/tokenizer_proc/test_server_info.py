"""The contents of /server_info."""

from __future__ import annotations

from fixtures.serving.tokenizer_front import Fake

from engine.messages import Stats


def test_step_times_are_left_to_the_metrics() -> None:
    front = Fake().front
    front.handle(Stats(running=2, step_seconds=[0.5, 0.25]))
    assert front.info()["stats"]["running"] == 2
    assert front.info()["stats"]["step_seconds"] == []
