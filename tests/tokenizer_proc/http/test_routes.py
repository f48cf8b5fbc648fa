"""The routes for models, tokenize, detokenize, health, metrics, server information and aborts."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from aiohttp.test_utils import TestClient
from fixtures.serving.api_calls import error, get, ok, post, serve
from fixtures.serving.fake_frontend import BOS, EOS, MAX_LENGTH, FakeFrontend

from tokenizer_proc.requests import text_work
from tokenizer_proc.text.tokenizer import Tokenizer


def test_models_list_the_base_and_its_adapters() -> None:
    cards = ok(get(FakeFrontend("pirate", "org/a:b"), "/v1/models"))["data"]
    assert [card["id"] for card in cards] == ["base", "org/Base-1", "pirate", "org/a:b"]
    base, pirate = cards[0], cards[2]
    assert (base["object"], base["owned_by"], base["parent"], base["root"]) == ("model", "chorus", None, "/srv/base")
    assert base["max_model_len"] == MAX_LENGTH
    assert (pirate["root"], pirate["parent"], pirate["state"]) == ("/srv/pirate", "base", "host")
    assert (pirate["adapter_id"], pirate["lora_rank"], pirate["revision"], pirate["pinned"]) == (1, 8, "r", False)
    for card in cards:
        assert card["created"] > 0
        assert card["permission"][0]["object"] == "model_permission"


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("base", "base"),
        ("org/Base-1", "org/Base-1"),
        ("org%2FBase-1", "org/Base-1"),
        ("org/a:b", "org/a:b"),
        ("org%2Fa%3Ab", "org/a:b"),
        ("base:org/a:b", "org/a:b"),
        ("50%25", "50%"),
    ],
)
def test_a_model_is_found_by_its_name(path: str, name: str) -> None:
    assert ok(get(FakeFrontend("org/a:b", "50%"), f"/v1/models/{path}"))["id"] == name


@pytest.mark.parametrize("path", ["ghost", "base:ghost", "org%2Fghost"])
def test_an_unknown_model_is_not_found(path: str) -> None:
    assert error(get(FakeFrontend(), f"/v1/models/{path}"), 404)["message"]


def test_models_have_no_length_before_the_engine_is_ready() -> None:
    frontend = FakeFrontend()
    frontend.capacity = None
    assert ok(get(frontend, "/v1/models"))["data"][0]["max_model_len"] is None


def test_tokenize_gives_tokens_and_count() -> None:
    for name in ("prompt", "text"):
        found = ok(post(FakeFrontend(), "/tokenize", {name: "né"}))
        assert found == {"tokens": [BOS, 110, 195, 169], "count": 4, "max_model_len": MAX_LENGTH}
    assert ok(post(FakeFrontend(), "/tokenize", {"prompt": "n", "add_special_tokens": False}))["tokens"] == [110]


def test_tokenize_renders_a_chat() -> None:
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "a"}]}
    assert bytes(ok(post(FakeFrontend(), "/tokenize", body))["tokens"]) == b"user: a\nassistant:"
    body |= {"add_generation_prompt": False, "chat_template_kwargs": {"x": 1}}
    assert bytes(ok(post(FakeFrontend(), "/tokenize", body))["tokens"]) == b"user: a\nx=1"


def test_tokenize_takes_exactly_one_text() -> None:
    error(post(FakeFrontend(), "/tokenize", {}))
    assert error(post(FakeFrontend(), "/tokenize", {"prompt": "a", "text": "b"}))["param"] == "text"
    assert error(post(FakeFrontend(), "/tokenize", {"prompt": "a", "model": "ghost"}), 404)["param"] == "model"


def test_detokenize_gives_the_text() -> None:
    found = ok(post(FakeFrontend(), "/detokenize", {"tokens": [BOS, 110, 195, 169]}))
    assert found == {"prompt": "<s>né", "text": "<s>né"}
    body = {"tokens": [BOS, 110], "skip_special_tokens": True}
    assert ok(post(FakeFrontend(), "/detokenize", body))["text"] == "n"


def test_the_text_of_long_tokens_is_bounded_by_memory() -> None:
    frontend = FakeFrontend()
    frontend.tokenizer.backend.add_tokens(["x" * 4096])
    frontend.tokenizer = Tokenizer(frontend.tokenizer.backend, frontend.tokenizer.special_tokens)

    async def scenario(client: TestClient) -> list[int]:
        statuses = []
        for count in (100, 2000, 100):  # texts of 0.4 and 8 million characters
            async with client.post("/detokenize", json={"tokens": [EOS + 1] * count}) as answer:
                statuses.append(answer.status)
                if answer.status == 200:
                    text = "x" * 4096 * count
                    assert await answer.json() == {"prompt": text, "text": text}
        return statuses

    assert serve(frontend, scenario, max_request_memory=16 << 20) == [200, 413, 200]


def test_an_error_of_a_text_names_its_own_field(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_work, "MOST_CHARACTERS", text_work.INLINE_CHARACTERS + 1)
    for field in ("text", "prompt"):
        body = {field: "a" * (text_work.INLINE_CHARACTERS + 2)}
        assert error(post(FakeFrontend(), "/tokenize", body))["param"] == field


@pytest.mark.parametrize("bad", [-1, 258, 2**70])
def test_detokenize_refuses_ids_outside_the_vocabulary(bad: int) -> None:
    assert error(post(FakeFrontend(), "/detokenize", {"tokens": [5, bad]}))["param"] == "tokens[1]"


def test_health_and_readiness_are_told_apart() -> None:
    frontend = FakeFrontend()
    assert get(frontend, "/health")[0] == 200
    assert get(frontend, "/ready")[0] == 200
    frontend.is_ready = False
    assert get(frontend, "/health")[0] == 200
    assert get(frontend, "/ready")[0] == 503
    frontend.is_stuck = True
    assert get(frontend, "/health") == (503, {"status": "stuck"})


@pytest.mark.parametrize("path", ["/health", "/ready", "/v1/models"])
def test_head_is_answered_like_get(path: str) -> None:
    async def scenario(client: TestClient) -> tuple[int, bytes]:
        async with client.head(path) as answer:
            return answer.status, await answer.read()

    assert serve(FakeFrontend(), scenario) == (200, b"")


def test_server_info_version_and_metrics_are_answered() -> None:
    assert ok(get(FakeFrontend(), "/server_info")) == ok(get(FakeFrontend(), "/get_server_info"))
    assert ok(get(FakeFrontend(), "/version"))["version"]

    async def scenario(client: TestClient) -> tuple[str, str]:
        async with client.get("/metrics") as answer:
            return answer.headers["Content-Type"], await answer.text()

    kind, text = serve(FakeFrontend(), scenario)
    assert kind.startswith("text/plain; version=0.0.4")
    assert text == "chorus_up 1\n"


@pytest.mark.parametrize("abort", [{"rid": "r1"}, {"rid": ["r1", "x"]}, {"abort_all": True}])
def test_abort_ends_a_request_by_its_rid(abort: dict[str, Any]) -> None:
    frontend = FakeFrontend()
    frontend.hold_after = 1

    async def scenario(client: TestClient) -> tuple[Any, Any]:
        call = asyncio.create_task(client.post("/generate", json={"text": "a", "rid": "r1"}))
        while not frontend.streams:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.01)
        async with client.post("/abort_request", json=abort) as answer:
            aborted = await answer.json()
        async with await call as answer:
            return aborted, await answer.json()

    aborted, answer = serve(frontend, scenario)
    assert aborted == {"aborted": 1}
    assert answer["text"] == "H"
    assert answer["meta_info"]["finish_reason"]["type"] == "abort"


def test_abort_ends_a_chat_by_its_id() -> None:
    frontend = FakeFrontend()
    frontend.hold_after = 1

    async def scenario(client: TestClient) -> str:
        body = {"messages": [{"role": "user", "content": "a"}], "stream": True}
        async with client.post("/v1/chat/completions", json=body) as answer:
            begin = await answer.content.readuntil(b"\n\n")
            name = begin.split(b'"id":"')[1].split(b'"')[0].decode()
            async with client.post("/abort_request", json={"rid": name}):
                return (await answer.content.read()).decode()

    text = serve(frontend, scenario)
    assert '"finish_reason":"abort"' in text
    assert text.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize(
    ("rid", "abort", "ends"),
    [(["r1", "r2"], "r2", [False, True]), ("r", "r", [True, True]), ("r", "r_0", [True, False])],
)
def test_abort_ends_some_prompts_of_a_list(rid: str | list[str], abort: str, ends: list[bool]) -> None:
    frontend = FakeFrontend()
    frontend.hold_after = 1

    async def scenario(client: TestClient) -> None:
        call = asyncio.create_task(client.post("/generate", json={"text": ["a", "b"], "rid": rid}))
        while len(frontend.streams) < 2:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.01)
        async with client.post("/abort_request", json={"rid": abort}) as answer:
            assert await answer.json() == {"aborted": 1}
        assert [stream.is_cancelled for stream in frontend.streams] == ends
        async with client.post("/abort_request", json={"abort_all": True}), await call as answer:
            for one in await answer.json():
                assert (one["text"], one["meta_info"]["finish_reason"]["type"]) == ("H", "abort")

    serve(frontend, scenario)


def test_a_call_that_is_aborted_by_two_ids_counts_once() -> None:
    frontend = FakeFrontend()
    frontend.hold_after = 1

    async def scenario(client: TestClient) -> None:
        call = asyncio.create_task(client.post("/generate", json={"text": ["a", "b"], "rid": ["r1", "r2"]}))
        while len(frontend.streams) < 2:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.01)
        async with client.post("/abort_request", json={"rid": ["r1", "ghost", "r2"]}) as answer:
            assert await answer.json() == {"aborted": 1}
        async with await call:
            assert [stream.is_cancelled for stream in frontend.streams] == [True, True]

    serve(frontend, scenario)


def test_abort_of_an_unknown_rid_is_no_error() -> None:
    assert ok(post(FakeFrontend(), "/abort_request", {"rid": "ghost"})) == {"aborted": 0}
    assert error(post(FakeFrontend(), "/abort_request", {}))["param"] == "rid"
