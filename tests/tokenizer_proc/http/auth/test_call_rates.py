"""Rates over HTTP: what calls are charged at the door and at the end, and how refusals say so."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from aiohttp.test_utils import TestClient
from fixtures.serving.api_calls import serve
from fixtures.serving.fake_frontend import MAX_LENGTH, FakeFrontend, FakeTemplate
from fixtures.serving.tokenizer_front import Fake

from engine.config.api_keys import ApiKey
from engine.messages import SamplingParams, Submit, Update
from tokenizer_proc.http.auth.rates import WINDOW

TEXT = "abcd"  # five tokens with <s>
ANSWER = 7  # tokens of the fake front end's answers, in full


def completion(**fields: Any) -> dict[str, Any]:
    return {"prompt": TEXT, "max_tokens": 5} | fields


async def post(client: TestClient, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any], float]:
    """Returns status, body and Retry-After (0: none) of a call."""
    async with client.post(path, json=body, headers={"Authorization": "Bearer k"}) as answer:
        return answer.status, await answer.json(), float(answer.headers.get("Retry-After", 0))


def served(front: Any, *calls: tuple[str, dict[str, Any]], at_once: bool = False, **rules: Any) -> list[Any]:
    """Returns (status, body, Retry-After) of each call with a key of these rules."""

    async def scenario(client: TestClient) -> list[Any]:
        if at_once:
            return list(await asyncio.gather(*(post(client, path, body) for path, body in calls)))
        return [await post(client, path, body) for path, body in calls]

    return serve(front, scenario, api_keys=[ApiKey(key="k", **rules)])


def statuses(answers: list[Any]) -> list[int]:
    return [status for status, _, _ in answers]


def test_parallel_calls_hold_the_limit_and_one_call_more() -> None:
    front = FakeFrontend()
    calls = [("/v1/completions", completion(max_tokens=5, ignore_eos=True))] * 100
    answers = served(front, *calls, at_once=True, tokens_per_minute=30)
    used = sum(body["usage"]["total_tokens"] for status, body, _ in answers if status == 200)
    assert 30 - 10 < used < 30 + 10
    waits = [wait for status, _, wait in answers if status == 429]
    assert len(waits) > 90
    assert all(1 <= wait <= WINDOW for wait in waits)


def test_calls_without_a_length_hold_the_limit_in_parallel() -> None:
    front = FakeFrontend()
    calls = [("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]})] * 50
    answers = served(front, *calls, at_once=True, tokens_per_minute=60)
    used = sum(body["usage"]["total_tokens"] for status, body, _ in answers if status == 200)
    assert 0 < used <= 60 + 60
    assert {status for status, _, _ in answers} == {200, 429}
    assert any("max_tokens" in body["error"]["message"] for status, body, _ in answers if status == 429)


def test_calls_without_a_length_work_one_after_the_other() -> None:
    chat = {"messages": [{"role": "user", "content": "x"}]}
    answers = served(FakeFrontend(), *[("/v1/chat/completions", chat)] * 3, tokens_per_minute=MAX_LENGTH // 2)
    assert statuses(answers) == [200, 200, 200]
    assert all(body["choices"][0]["finish_reason"] == "stop" for _, body, _ in answers)


def test_an_answer_without_a_length_ends_within_the_limit() -> None:
    front = FakeFrontend()
    front.reply = "x" * 200
    chat = {"messages": [{"role": "user", "content": "x"}]}
    [(status, body, _)] = served(front, ("/v1/chat/completions", chat), tokens_per_minute=50)
    assert status == 200
    assert body["usage"]["total_tokens"] == 50
    assert body["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("path", "body", "rules"),
    [
        ("/v1/completions", completion(max_tokens=100), {"tokens_per_minute": 50}),
        ("/v1/completions", completion(n=10), {"tokens_per_minute": 50}),
        ("/v1/completions", completion(prompt=[TEXT] * 10), {"tokens_per_minute": 50}),
        ("/v1/completions", completion(prompt="x" * 60), {"tokens_per_minute": 50}),
        ("/v1/completions", {"prompt": "x" * 60}, {"tokens_per_minute": 50}),
        ("/v1/completions", completion(max_tokens=10**18), {"tokens_per_minute": 50}),
        ("/generate", {"text": TEXT, "sampling_params": {"max_new_tokens": 100}}, {"tokens_per_minute": 50}),
        ("/v1/completions", completion(n=3), {"requests_per_minute": 2}),
        ("/generate", {"text": ["x"] * 3}, {"requests_per_minute": 2}),
    ],
)
def test_a_call_above_the_limit_is_told_so_for_good(path: str, body: dict[str, Any], rules: dict[str, int]) -> None:
    """No Retry-After, because waiting would not help, and nothing is charged."""
    small = ("/v1/completions", completion(prompt="x", max_tokens=1))
    [(status, answer, wait), (after, _, _)] = served(FakeFrontend(), (path, body), small, **rules)
    assert (status, wait, after) == (400, 0, 200)
    assert answer["error"]["code"] == "exceeds_rate_limit"
    [(rule, limit)] = rules.items()
    assert rule in answer["error"]["message"]
    assert f"this key has {limit} a minute" in answer["error"]["message"]


def test_requests_count_prompts_times_n() -> None:
    for body in (completion(n=4), completion(prompt=[TEXT] * 4), completion(prompt=[TEXT] * 2, n=2)):
        answers = served(FakeFrontend(), *[("/v1/completions", body)] * 3, requests_per_minute=8)
        assert statuses(answers) == [200, 200, 429]
        assert answers[2][1]["error"]["code"] == "rate_limit_exceeded"


def test_what_was_not_used_is_given_back() -> None:
    """Each call asks for 99 tokens and uses 12."""
    calls = [("/v1/completions", completion(max_tokens=94))] * 10
    answers = served(FakeFrontend(), *calls, tokens_per_minute=99)
    assert {body["usage"]["total_tokens"] for status, body, _ in answers if status == 200} == {5 + ANSWER}
    assert statuses(answers) == [200] * 9 + [429]


@pytest.mark.parametrize("way", ["error", "refusal", "disconnect", "failed stream"])
def test_a_call_that_fails_is_charged_for_what_it_used(way: str) -> None:
    front = FakeFrontend()
    if way == "refusal":
        front.refusal = ValueError("no")
    elif way == "disconnect":
        front.hold_after = 2
    else:
        front.fail_after = 2
    body = completion(max_tokens=94) | ({"stream": True} if way == "failed stream" else {})

    async def scenario(client: TestClient) -> list[int]:
        headers = {"Authorization": "Bearer k"}
        for _ in range(10):
            call = asyncio.ensure_future(client.post("/v1/completions", json=body, headers=headers))
            if way == "disconnect":
                left = front.left
                await asyncio.sleep(0.05)
                call.cancel()
                while front.left == left:
                    await asyncio.sleep(0.01)
            else:
                async with await call as answer:
                    await answer.read()
        front.hold_after = front.fail_after = front.refusal = None
        return [(await post(client, "/v1/completions", completion(max_tokens=94)))[0] for _ in range(5)]

    found = serve(front, scenario, api_keys=[ApiKey(key="k", tokens_per_minute=99)])
    assert found == ([200] * 5 if way == "refusal" else [200] * 3 + [429] * 2)  # ten times 7 tokens, or none


def test_a_refused_call_does_not_count_as_a_request() -> None:
    rules = {"tokens_per_minute": 20, "requests_per_minute": 3}
    front = FakeFrontend()
    big, small = completion(max_tokens=12, prompt="x" * 7), completion(prompt="x", max_tokens=1)
    answers = served(front, ("/v1/completions", big), ("/v1/completions", big), ("/v1/completions", small), **rules)
    assert statuses(answers)[0] == 200
    assert len(front.submits) <= 3


def test_tokenize_and_detokenize_are_charged() -> None:
    for path, body in (("/tokenize", {"prompt": "x" * 29}), ("/detokenize", {"tokens": [70] * 30})):
        answers = served(FakeFrontend(), *[(path, body)] * 5, tokens_per_minute=100)
        assert statuses(answers) == [200, 200, 200, 200, 429]
        assert 1 <= answers[4][2] <= WINDOW
    [(status, _, _), (again, _, _)] = served(
        FakeFrontend(), *[("/tokenize", {"prompt": "x" * 1000})] * 2, tokens_per_minute=100
    )
    assert (status, again) == (200, 429)


def test_a_chat_is_not_rendered_beyond_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    rendered = []
    render = FakeTemplate.render
    monkeypatch.setattr(FakeTemplate, "render", lambda *given, **named: rendered.append(1) or render(*given, **named))
    body = {"messages": [{"role": "user", "content": "x" * 1000}]}
    assert statuses(served(FakeFrontend(), *[("/tokenize", body)] * 3, tokens_per_minute=100)) == [200, 429, 429]
    assert len(rendered) == 1


def test_shorter_answers_reach_the_scheduler() -> None:
    front = Fake()
    asked: list[tuple[int, int, int, int]] = []

    async def work() -> None:
        def reserve(prompt: int, choices: int, least: int, most: int) -> int:
            asked.append((prompt, choices, least, most))
            return 7

        for params in (SamplingParams(n=2), SamplingParams(max_tokens=20), SamplingParams(min_tokens=3)):
            async with front.front.open(Submit(id=1, prompt=[5, 6, 7], params=params), reserve=reserve):
                pass

    asyncio.run(work())
    assert asked == [(3, 2, 1, 125), (3, 1, 20, 20), (3, 1, 3, 125)]
    assert [each.stopping.max_tokens for each in front.generates] == [7, 7, 7, 7]


def test_nothing_is_sent_for_a_prompt_that_is_refused() -> None:
    front = Fake()

    async def scenario(client: TestClient) -> list[int]:
        body = {"prompt": [[5, 6, 7]], "max_tokens": 20, "stream": True}
        headers = {"Authorization": "Bearer k"}
        first = asyncio.ensure_future(client.post("/v1/completions", json=body, headers=headers))
        while not front.generates:
            await asyncio.sleep(0.01)
        second = (await post(client, "/v1/completions", body))[0]
        front.say(Update(request_id=front.generates[0].request_id, index=0, tokens=[5], finish="length"))
        async with await first as answer:
            await answer.read()
        return [answer.status, second]

    assert serve(front.front, scenario, api_keys=[ApiKey(key="k", tokens_per_minute=23)]) == [200, 429]
    assert len(front.generates) == 1


def test_headers_tell_what_is_left() -> None:
    async def scenario(client: TestClient) -> list[dict[str, str]]:
        found = []
        for _ in range(2):
            headers = {"Authorization": "Bearer k"}
            async with client.post("/v1/completions", json=completion(n=2), headers=headers) as answer:
                found.append({name: text for name, text in answer.headers.items() if name.startswith("x-ratelimit")})
        return found

    first, second = serve(FakeFrontend(), scenario, api_keys=[ApiKey(key="k", tokens_per_minute=100)])
    assert 0 < int(first.pop("x-ratelimit-reset-tokens").removesuffix("s")) <= WINDOW
    assert first == {"x-ratelimit-limit-tokens": "100", "x-ratelimit-remaining-tokens": "85"}
    assert second["x-ratelimit-remaining-tokens"] == "70"
    [none] = serve(FakeFrontend(), scenario, api_keys=[ApiKey(key="k")])[:1]
    assert none == {}
