"""The unmodified `openai` package as the client of a real server."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import openai
import pytest
from fixtures.models.oracle import Oracle
from fixtures.models.tiny_models import make_adapter
from fixtures.serving.running import RunningServer

pytestmark = pytest.mark.e2e

IGNORE_EOS = {"ignore_eos": True}


@pytest.fixture(scope="module")
def model(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("llama3")


@pytest.fixture(scope="module")
def adapter(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(model, tmp_path_factory.mktemp("adapters") / "sql", r=8)


@pytest.fixture(scope="module")
def server(model: Path, adapter: Path) -> Iterator[RunningServer]:
    flags = [
        "--served-model-name",
        "org/base",
        "--lora-paths",
        f"team/sql={adapter}",
        f"other={adapter}",
        "--dtype",
        "float32",
    ]
    with RunningServer("--model-path", model, *flags) as server:
        yield server


@pytest.fixture
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def test_streamed_chat_equals_the_whole_answer(client: openai.OpenAI) -> None:
    ask = {"model": "team/sql", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 12, "temperature": 0}
    whole = client.chat.completions.create(**ask)
    chunks = list(client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage == whole.usage
    assert whole.model == "team/sql"
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens


def test_seed_n_and_stop_have_their_effect(client: openai.OpenAI) -> None:
    ask = {"model": "org/base", "prompt": "the quick", "max_tokens": 20, "temperature": 1.0, "extra_body": IGNORE_EOS}
    first = client.completions.create(**ask, seed=5, n=3)
    again = client.completions.create(**ask, seed=5, n=3)
    other = client.completions.create(**ask, seed=6, n=3)
    texts = [choice.text for choice in first.choices]
    assert texts == [choice.text for choice in again.choices]
    assert texts != [choice.text for choice in other.choices]
    assert len(set(texts)) == 3
    assert first.usage.completion_tokens == 60
    stop = texts[0].strip()[2:4]
    cut = client.completions.create(**ask, seed=5, stop=[stop])
    assert cut.choices[0].finish_reason == "stop"
    assert cut.choices[0].text == texts[0][: texts[0].index(stop)]


def test_logprobs_equal_the_oracles(client: openai.OpenAI, model: Path, adapter: Path) -> None:
    oracle = Oracle(model, {"sql": adapter})
    prompt = [40, 41, 42, 43]
    answer = client.completions.create(
        model="team/sql", prompt=prompt, max_tokens=4, temperature=0, logprobs=3, echo=True, extra_body=IGNORE_EOS
    )
    scored = answer.choices[0].logprobs
    tokens = oracle.greedy(prompt, 4, "sql")
    expected = oracle.logprobs([*prompt, *tokens], "sql")
    assert scored.token_logprobs[0] is None
    for position, token in enumerate([*prompt, *tokens][1:], start=1):
        assert math.isclose(scored.token_logprobs[position], float(expected[position - 1, token]), abs_tol=1e-4)
        best = expected[position - 1].topk(3).values.tolist()
        assert sorted(scored.top_logprobs[position].values(), reverse=True)[:3] == pytest.approx(best, abs=1e-4)

    chat = client.chat.completions.create(
        model="org/base",
        messages=[{"role": "user", "content": "hi"}],
        max_tokens=3,
        temperature=0,
        logprobs=True,
        top_logprobs=2,
    )
    for entry in chat.choices[0].logprobs.content:
        assert entry.logprob <= 0
        assert entry.logprob == entry.top_logprobs[0].logprob  # greedy: the chosen token is the most likely
        assert len(entry.top_logprobs) == 2


def test_models_lists_base_and_adapters(client: openai.OpenAI, adapter: Path) -> None:
    cards = {card.id: card for card in client.models.list().data}
    assert list(cards) == ["org/base", "team/sql", "other"]
    assert client.models.retrieve("team/sql").id == "team/sql"
    assert cards["team/sql"].parent == "org/base"
    assert cards["team/sql"].root == str(adapter.resolve())
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("team/none")


def test_errors_raise_the_clients_classes(client: openai.OpenAI) -> None:
    chat = client.chat.completions.create
    hello = [{"role": "user", "content": "hi"}]
    with pytest.raises(openai.NotFoundError, match="no-such"):
        chat(model="no-such", messages=hello)
    with pytest.raises(openai.BadRequestError, match="temperature"):
        chat(model="org/base", messages=hello, temperature=-1)
    with pytest.raises(openai.BadRequestError, match="tools"):
        chat(model="org/base", messages=hello, tools=[{"type": "function", "function": {"name": "f"}}])
    with pytest.raises(openai.BadRequestError, match="response_format"):
        chat(model="org/base", messages=hello, response_format={"type": "json_object"})
    with pytest.raises(openai.BadRequestError, match="surprise"):
        chat(model="org/base", messages=hello, extra_body={"surprise": 1})
    with pytest.raises(openai.BadRequestError, match="context"):
        client.completions.create(model="org/base", prompt=[9] * 5000, max_tokens=1)
    with pytest.raises(openai.BadRequestError, match="team/sql"):
        chat(model="team/sql", messages=hello, extra_body={"lora_path": "other"})
    assert chat(model="org/base:team/sql", messages=hello, max_tokens=1, user="u", metadata={"a": "b"}).choices


def test_async_client_runs_many_requests_at_once(server: RunningServer) -> None:
    async def main() -> list[str]:
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
            answers = await asyncio.gather(
                *(
                    client.completions.create(
                        model=["org/base", "team/sql"][number % 2],
                        prompt="one two",
                        max_tokens=10,
                        temperature=0,
                        extra_body=IGNORE_EOS,
                    )
                    for number in range(40)
                )
            )
            return [answer.choices[0].text for answer in answers]

    texts = asyncio.run(main())
    assert len(set(texts[::2])) == 1
    assert len(set(texts[1::2])) == 1
    assert texts[0] != texts[1]
