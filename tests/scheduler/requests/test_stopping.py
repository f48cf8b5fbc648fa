"""scheduler.requests.stopping: the length limit, and what ends a request."""

from __future__ import annotations

import pytest

from engine.messages import Capacity, Sampling, Stopping
from scheduler.requests.request import Request
from scheduler.requests.stopping import finish_of, fit_to_capacity
from scheduler.types import BASE


def _request(prompt: int, generated: list[int], stopping: Stopping) -> Request:
    tokens = [1] * prompt + generated
    return Request(1, BASE, (0, 1), prompt, tokens, Sampling(), stopping)


def _capacity(pages: int, max_length: int = 100) -> Capacity:
    return Capacity(kv_pages=pages, page_size=4, rows=1, max_length=max_length, max_batched_tokens=8, vocab_size=9)


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "pages", "limit"),
    [
        (5, 10, 100, 15),
        (5, 1000, 100, 100),  # limited by the context
        (5, 1000, 3, 13),  # 12 positions have pages; the 13th token is sampled and never computed
        (12, 5, 3, 13),
    ],
)
def test_limit_is_set_by_tokens_context_and_pages(prompt: int, max_tokens: int, pages: int, limit: int) -> None:
    request = _request(prompt, [], Stopping(max_tokens))
    assert fit_to_capacity(request, _capacity(pages)) is None
    assert request.limit == limit


@pytest.mark.parametrize(("prompt", "text"), [(13, "13 tokens, but at most 12"), (0, "empty")])
def test_prompt_that_cannot_be_served_is_refused(prompt: int, text: str) -> None:
    problem = fit_to_capacity(_request(prompt, [], Stopping(1)), _capacity(3))
    assert problem is not None
    assert text in problem


@pytest.mark.parametrize(
    ("generated", "stopping", "ending"),
    [
        ([], Stopping(1, 0, [1]), None),  # the last prompt token is an end id, but not generated
        ([5], Stopping(3, 0, [7]), None),
        ([7], Stopping(3, 0, [7]), ("stop", 7)),
        ([7], Stopping(3, 1, [7]), None),
        ([5, 7], Stopping(3, 1, [7]), ("stop", 7)),
        ([5, 6, 8], Stopping(3, 0, [7]), ("length", None)),
        ([5, 6, 7], Stopping(3, 0, [7]), ("stop", 7)),
    ],
)
def test_request_ends_by_end_id_or_length(
    generated: list[int], stopping: Stopping, ending: tuple[str, int | None] | None
) -> None:
    request = _request(2, generated, stopping)
    assert fit_to_capacity(request, _capacity(100)) is None
    assert finish_of(request) == ending
