"""The routes with the real front end and a scripted scheduler."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
from aiohttp.test_utils import TestClient
from fixtures.serving.api_calls import error, get, ok, post, serve, stream
from fixtures.serving.scripted_scheduler import ScriptedScheduler

from engine.messages import LogprobIds, Progress, Submit, Update
from tokenizer_proc.http.batch import Batch

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}


def test_chat_text_comes_from_the_scheduler() -> None:
    scheduler = ScriptedScheduler("Ahoy é!", "pirate")
    body = CHAT | {"model": "base:pirate", "seed": 5, "n": 2, "temperature": 0}
    answer = ok(post(scheduler.frontend(), "/v1/chat/completions", body))
    assert [choice["message"]["content"] for choice in answer["choices"]] == ["Ahoy é!"] * 2
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["stop"] * 2
    assert answer["usage"]["completion_tokens"] == 18
    first, second = scheduler.generates
    assert bytes(first.prompt[1:]) == b"user: hi\nassistant:"
    assert (first.lora, first.sampling.seed, second.sampling.seed) == ([(1, 1.0)], 5, 6)


def test_stop_string_in_a_stream() -> None:
    scheduler = ScriptedScheduler("one, two, three")
    events = stream(scheduler.frontend(), "/v1/completions", {"prompt": "count:", "stop": ", th"})
    assert "".join(event["choices"][0]["text"] for event in events[:-1]) == "one, two"
    assert events[-2]["choices"][0]["finish_reason"] == "stop"
    assert len(scheduler.aborted) == 1


def test_echo_with_scores() -> None:
    scheduler = ScriptedScheduler("c")
    body = {"prompt": "ab", "echo": True, "logprobs": 1, "max_tokens": 0, "n": 2}
    answer = ok(post(scheduler.frontend(), "/v1/completions", body))
    for choice in answer["choices"]:
        assert choice["text"] == "ab"
        assert choice["logprobs"]["token_logprobs"] == [None, -1.0, -1.0]
        assert choice["logprobs"]["top_logprobs"][1] == {"A": -0.5, "a": -1.0}
    events = stream(ScriptedScheduler("c").frontend(), "/v1/completions", body)
    assert sum(len(event["choices"][0]["logprobs"]["tokens"]) for event in events[:-1]) == 6


@pytest.mark.parametrize("streams", [True, False])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "abc", "echo": True, "logprobs": 1}),
        ("/generate", {"text": "abc", "return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 1}),
    ],
)
def test_an_abort_amid_the_prompts_scores(path: str, body: dict[str, Any], streams: bool) -> None:
    """One of three prompt positions was scored: the response ends without the prompt's log-probabilities."""
    scheduler = ScriptedScheduler("c")
    scheduler.hold_after = 0
    frontend = scheduler.frontend()

    async def scenario(client: TestClient) -> str:
        call = asyncio.create_task(client.post(path, json=body | {"stream": streams}))
        while not scheduler.generates:
            await asyncio.sleep(0.01)
        piece = [LogprobIds(97, -1.0, [(65, -0.5)])]
        request_id = scheduler.generates[0].request_id
        frontend.handle(Progress(0, [Update(request_id=request_id, index=0, prompt_logprobs=piece)]))
        await asyncio.sleep(0.01)
        async with client.post("/abort_request", json={"abort_all": True}) as answer:
            assert await answer.json() == {"aborted": 1}
        async with await call as answer:
            assert answer.status == 200
            return await answer.text()

    text = serve(frontend, scenario)
    assert '"abort"' in text
    assert "-1.0" not in text
    assert "error" not in text


def test_generate_with_mixed_adapters() -> None:
    scheduler = ScriptedScheduler("ok", "a", "b")
    body = {"text": ["x", "y", "z"], "lora_path": ["a", None, {"a": 0.5, "b": 0.25}]}
    answers = ok(post(scheduler.frontend(), "/generate", body))
    assert [one["text"] for one in answers] == ["ok"] * 3
    assert [sorted(one.lora) for one in scheduler.generates] == [[(1, 1.0)], [], [(1, 0.5), (2, 0.25)]]
    assert answers[0]["meta_info"]["finish_reason"] == {"type": "stop", "matched": 257}


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize"])
@pytest.mark.parametrize("name", ["self", "messages", "add_generation_prompt"])
def test_template_arguments_cannot_name_fields(path: str, name: str) -> None:
    body = CHAT | {"chat_template_kwargs": {name: "x"}}
    assert error(post(ScriptedScheduler("x").frontend(), path, body))["param"] == "chat_template_kwargs"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/generate"])
def test_hanging_up_aborts(path: str) -> None:
    scheduler = ScriptedScheduler("long", "a")
    scheduler.hold_after = 1
    frontend = scheduler.frontend()
    body: dict[str, Any] = {"text": ["x", "y"]} if path == "/generate" else CHAT

    async def scenario(client: Any) -> None:
        call = asyncio.create_task(client.post(path, json=body))
        while not scheduler.generates:
            await asyncio.sleep(0.005)
        call.cancel()
        while frontend.router.open:
            await asyncio.sleep(0.005)

    serve(frontend, scenario)
    assert sorted(scheduler.aborted) == sorted(one.request_id for one in scheduler.generates)


def test_errors_name_the_clients_own_field() -> None:
    frontend = ScriptedScheduler("x").frontend()
    assert error(post(frontend, "/v1/chat/completions", CHAT | {"model": "ghost"}), 404)["param"] == "model"
    assert error(post(frontend, "/generate", {"text": "x" * 600}))["param"] == "text"
    body = {"text": "x", "sampling_params": {"max_new_tokens": 9999}}
    assert error(post(frontend, "/generate", body))["param"] == "sampling_params.max_new_tokens"
    assert error(post(frontend, "/generate", {"text": "x", "lora_path": "ghost"}), 404)["param"] == "lora_path"


def test_server_info_has_the_engines_facts() -> None:
    frontend = ScriptedScheduler("x", "a").frontend()
    assert get(frontend, "/ready")[0] == 200
    assert ok(get(frontend, "/server_info"))["adapters"] == ["a"]
    assert [card["id"] for card in ok(get(frontend, "/v1/models"))["data"]] == ["base", "org/Base-1", "a"]
    body = {"messages": CHAT["messages"]}
    assert ok(post(frontend, "/tokenize", body))["count"] == len("user: hi\nassistant:") + 1


def test_many_streams_with_random_disconnects_leave_nothing() -> None:
    scheduler = ScriptedScheduler("a long answer " * 8, "a", "b")
    frontend = scheduler.frontend()
    dice = random.Random(0)

    async def one(client: Any, leaves: bool) -> str:
        body = CHAT | {"stream": True, "model": dice.choice(["base", "a", "b"]), "n": dice.randint(1, 3)}
        async with client.post("/v1/chat/completions", json=body) as answer:
            if leaves:
                await answer.content.readuntil(b"\n\n")
                answer.close()
                return ""
            return str(await answer.text())

    async def scenario(client: Any) -> list[str]:
        texts = await asyncio.gather(*(one(client, number % 2 == 0) for number in range(64)))
        while frontend.router.open or any(card.running for card in frontend.adapters.cards()):
            await asyncio.sleep(0.005)
        return texts

    texts = serve(frontend, scenario)
    assert sum(text.endswith("data: [DONE]\n\n") for text in texts) == 32
    assert len(scheduler.generates) >= 64


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/generate", {"text": ["a"] * 5}, "text"),
        ("/generate", {"input_ids": [[7]] * 5}, "input_ids"),
        ("/v1/completions", {"prompt": ["a"] * 5}, "prompt"),
        ("/v1/completions", {"prompt": ["a", "b"], "n": 3}, "prompt"),
        ("/generate", {"text": "a", "sampling_params": {"n": 5}}, "text"),
    ],
)
def test_a_call_of_more_answers_than_can_be_open(path: str, body: dict[str, Any], param: str) -> None:
    scheduler = ScriptedScheduler("x")
    frontend = scheduler.frontend(max_open_requests=4)
    refusal = error(serve(frontend, lambda client: answered(client, path, body), max_open_requests=4))
    assert refusal["param"] == param
    assert "at most 4" in refusal["message"]
    assert not scheduler.generates


async def answered(client: TestClient, path: str, body: dict[str, Any]) -> tuple[int, Any]:
    async with client.post(path, json=body) as answer:
        return answer.status, await answer.json()


def test_other_calls_go_on_while_a_large_one_is_taken_in() -> None:
    scheduler = ScriptedScheduler("x")
    frontend = scheduler.frontend()
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    async def take_in() -> None:
        task = asyncio.ensure_future(others())
        async with Batch(frontend, [Submit(id=number, prompt="a") for number in range(50)]):
            assert turns >= 49
        task.cancel()

    asyncio.run(take_in())


@pytest.mark.parametrize("streams", [True, False])
def test_max_new_tokens_0_scores_the_prompt_alone(streams: bool) -> None:
    body = {"text": "abc", "return_logprob": True, "logprob_start_len": 1, "sampling_params": {"max_new_tokens": 0}}
    front = ScriptedScheduler("c").frontend()
    answer = stream(front, "/generate", body)[-2] if streams else ok(post(front, "/generate", body))
    meta = answer["meta_info"]
    assert (answer["text"], answer["output_ids"], meta["completion_tokens"]) == ("", [], 0)
    assert meta["finish_reason"] == {"type": "length", "length": 0}
    assert meta["input_token_logprobs"] == [[-1.0, ord(letter), None] for letter in "abc"]
    assert meta["output_token_logprobs"] == []
