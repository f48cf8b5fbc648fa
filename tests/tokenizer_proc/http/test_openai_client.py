"""The `openai` package as a client of the app: its calls, types and exception classes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import openai
import pytest
from aiohttp.test_utils import TestClient
from fixtures.serving.api_calls import serve
from fixtures.serving.fake_frontend import FakeFrontend

from engine.errors import EngineDead, EngineError, Forbidden, InternalError, NotFound, Overloaded, Unauthorized

T = TypeVar("T")
MESSAGES: Any = [{"role": "user", "content": "a"}]


def _with_async(frontend: FakeFrontend, scenario: Callable[[openai.AsyncOpenAI], Awaitable[T]]) -> T:
    async def run(http: TestClient) -> T:
        url = str(http.make_url("/v1"))
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
            return await scenario(client)

    return serve(frontend, run)


def _with_sync(frontend: FakeFrontend, scenario: Callable[[openai.OpenAI], T]) -> T:
    def run(url: str) -> T:
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
            return scenario(client)

    async def in_thread(http: TestClient) -> T:
        return await asyncio.to_thread(run, str(http.make_url("/v1")))

    return serve(frontend, in_thread)


def test_chat_answers_are_parsed() -> None:
    async def scenario(client: openai.AsyncOpenAI) -> Any:
        return await client.chat.completions.create(
            model="base", messages=MESSAGES, n=2, logprobs=True, top_logprobs=2, user="u", metadata={"a": "b"}
        )

    answer = _with_async(FakeFrontend(), scenario)
    assert [choice.message.content for choice in answer.choices] == ["Hi é0", "Hi é1"]
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].logprobs.content[0].token == "H"
    assert len(answer.choices[0].logprobs.content[0].top_logprobs) == 2
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 14
    assert answer.usage.prompt_tokens_details.cached_tokens == 2


def test_an_answer_can_be_sent_back() -> None:
    def scenario(client: openai.OpenAI) -> Any:
        answer = client.chat.completions.create(model="base", messages=MESSAGES)
        spoken: Any = answer.choices[0].message
        turns = [*MESSAGES, spoken, *MESSAGES]
        client.chat.completions.create(model="base", messages=turns)
        turns[1] = spoken.model_dump()
        return client.chat.completions.create(model="base", messages=turns)

    frontend = FakeFrontend()
    _with_sync(frontend, scenario)
    assert frontend.submits[1].prompt == frontend.submits[2].prompt
    assert [turn.content for turn in frontend.submits[2].prompt] == ["a", "Hi é0", "a"]  # type: ignore[union-attr]


def test_chat_streams_are_parsed() -> None:
    async def scenario(client: openai.AsyncOpenAI) -> list[Any]:
        stream = await client.chat.completions.create(
            model="base", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
        )
        return [chunk async for chunk in stream]

    *chunks, usage = _with_async(FakeFrontend(), scenario)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Hi é0"
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert usage.choices == []
    assert usage.usage.completion_tokens == 7


def test_the_stream_helper_assembles_the_answer() -> None:
    async def scenario(client: openai.AsyncOpenAI) -> Any:
        async with client.chat.completions.stream(model="base", messages=MESSAGES) as stream:
            return await stream.get_final_completion()

    assert _with_async(FakeFrontend(), scenario).choices[0].message.content == "Hi é0"


def test_seed_stop_and_extras_arrive() -> None:
    frontend = FakeFrontend("pirate")
    frontend.reply = "{seed}-"

    def scenario(client: openai.OpenAI) -> Any:
        return client.chat.completions.create(
            model="pirate",
            messages=MESSAGES,
            seed=42,
            stop=["x"],
            max_completion_tokens=9,
            logit_bias={"5": -100},
            extra_body={"top_k": 3, "min_p": 0.1, "lora_path": "pirate"},
        )

    answer = _with_sync(frontend, scenario)
    assert answer.choices[0].message.content == "42-0"
    assert answer.model == "pirate"
    params = frontend.submits[0].params
    assert (params.seed, params.stop, params.max_tokens, params.top_k) == (42, ["x"], 9, 3)
    assert params.logit_bias == {5: -100.0}
    assert frontend.submits[0].lora == "pirate"


def test_completions_are_parsed() -> None:
    def scenario(client: openai.OpenAI) -> Any:
        whole = client.completions.create(model="base", prompt=["a", "b"], logprobs=1, echo=True)
        streamed = client.completions.create(model="base", prompt="a", stream=True)
        return whole, [chunk.choices[0].text for chunk in streamed]

    whole, pieces = _with_sync(FakeFrontend(), scenario)
    assert [choice.text for choice in whole.choices] == ["aHi é0", "bHi é0"]
    assert whole.choices[1].logprobs.token_logprobs[:2] == [None, -1.0]
    assert whole.choices[1].logprobs.text_offset[:3] == [0, 0, 1]
    assert "".join(pieces) == "Hi é0"


def test_models_are_listed() -> None:
    async def scenario(client: openai.AsyncOpenAI) -> Any:
        names = [model.id async for model in await client.models.list()]
        return names, [await client.models.retrieve(name) for name in names]

    names, cards = _with_async(FakeFrontend("org/a:b"), scenario)
    assert names == ["base", "org/Base-1", "org/a:b"]
    assert [card.id for card in cards] == names
    assert cards[2].parent == "base"


@pytest.mark.parametrize(
    ("refusal", "kind"),
    [
        (Unauthorized("no"), openai.AuthenticationError),
        (Forbidden("no"), openai.PermissionDeniedError),
        (NotFound("no"), openai.NotFoundError),
        (Overloaded("no"), openai.InternalServerError),
        (EngineDead("no"), openai.InternalServerError),
        (InternalError("no"), openai.InternalServerError),
    ],
)
def test_errors_become_the_clients_exceptions(refusal: EngineError, kind: type[openai.APIStatusError]) -> None:
    frontend = FakeFrontend()
    frontend.refusal = refusal
    with pytest.raises(kind) as caught:
        _with_sync(frontend, lambda client: client.chat.completions.create(model="base", messages=MESSAGES))
    assert caught.value.type == refusal.kind
    assert caught.value.request_id


def test_bad_request_names_the_field() -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        _with_sync(
            FakeFrontend(),
            lambda client: client.chat.completions.create(model="base", messages=MESSAGES, temperature=-1),
        )
    assert caught.value.param == "temperature"


def test_unknown_model() -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        _with_sync(FakeFrontend(), lambda client: client.chat.completions.create(model="ghost", messages=MESSAGES))
    assert (caught.value.param, caught.value.code) == ("model", "model_not_found")
    with pytest.raises(openai.NotFoundError):
        _with_sync(FakeFrontend(), lambda client: client.models.retrieve("org/ghost"))


def test_tools_are_refused() -> None:
    tools: Any = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    with pytest.raises(openai.BadRequestError, match="tool"):
        _with_sync(
            FakeFrontend(), lambda client: client.chat.completions.create(model="base", messages=MESSAGES, tools=tools)
        )


def test_an_error_in_mid_stream_is_raised() -> None:
    frontend = FakeFrontend()
    frontend.fail_after, frontend.failure = 2, EngineDead("the engine is gone")

    async def scenario(client: openai.AsyncOpenAI) -> None:
        async for _ in await client.chat.completions.create(model="base", messages=MESSAGES, stream=True):
            pass

    with pytest.raises(openai.APIError, match="the engine is gone"):
        _with_async(frontend, scenario)


def test_an_overload_is_retried() -> None:
    class Busy(FakeFrontend):
        def open(self, submit: Any, *rest: Any) -> Any:
            self.refusal = Overloaded("full", retry_after=0.01) if len(self.submits) < 1 else None
            return super().open(submit, *rest)

    async def scenario(client: openai.AsyncOpenAI) -> Any:
        patient = client.with_options(max_retries=1)
        return await patient.chat.completions.create(model="base", messages=MESSAGES)

    assert _with_async(Busy(), scenario).choices[0].message.content == "Hi é0"
