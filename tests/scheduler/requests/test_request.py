"""scheduler.requests.request: the lane key, replays, scores, and the loss of steps in flight."""

from __future__ import annotations

import pytest

from engine.messages import Generate, Sampling, Stopping
from scheduler.requests.request import from_message
from scheduler.types import BASE, lane_key


@pytest.mark.parametrize(
    ("lora", "key"),
    [
        ([], BASE),
        ([(2, 0.5), (1, 1.0)], ((1, 1.0), (2, 0.5))),
        ([(3, 0.5), (3, 0.25)], ((3, 0.75),)),
    ],
)
def test_lane_key_sorts_and_sums_the_scales(lora: list[tuple[int, float]], key: tuple[tuple[int, float], ...]) -> None:
    assert lane_key(lora) == key


def _generate(**sampling: float) -> Generate:
    return Generate(
        epoch=0,
        request_id=1,
        prompt=[1, 2, 3],
        generated=[4],
        sampling=Sampling(**sampling),  # type: ignore[arg-type]
        stopping=Stopping(5),
        priority=2,
    )


def test_replayed_tokens_count_as_generated() -> None:
    request = from_message(_generate(), BASE, (2, 7))
    assert (request.tokens, request.generated, request.order) == ([1, 2, 3, 4], 1, (2, 7))


@pytest.mark.parametrize("penalty", ["repetition_penalty", "presence_penalty", "frequency_penalty"])
def test_history_is_needed_only_for_penalties(penalty: str) -> None:
    assert not from_message(_generate(), BASE, 0).needs_history
    assert from_message(_generate(**{penalty: 0.5}), BASE, 0).needs_history


def test_lost_steps_leave_their_scores_to_be_planned_again() -> None:
    request = from_message(_generate(prompt_logprobs=0), BASE, 0)
    request.scored, request.steps_in_flight, request.pending = 2, 2, 1
    request.scores_known = 1
    request.lose_steps_in_flight()
    assert (request.scored, request.steps_in_flight, request.pending) == (1, 0, 0)
