"""The calls that clients of SGLang and vLLM make beside generating: health, load, information, the prefix cache."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import pytest
from aiohttp.test_utils import TestClient
from fixtures.serving.api_calls import error, get, ok, post, serve
from fixtures.serving.fake_frontend import BOS
from fixtures.serving.scripted_scheduler import ScriptedScheduler

from engine.messages import Stats
from tokenizer_proc.http.app import ROUTES
from tokenizer_proc.http.routes import operations
from tokenizer_proc.http.routes.openapi import page, specification

COMPLETION = {"prompt": "a", "max_tokens": 1}


def test_health_generate_generates_a_token() -> None:
    scheduler = ScriptedScheduler("c")
    assert ok(get(scheduler.frontend(), "/health_generate")) == {"status": "ok"}
    [generate] = scheduler.generates
    assert (generate.prompt, generate.stopping.max_tokens) == ([0], 1)


def test_health_generate_shares_one_token_among_its_calls() -> None:
    scheduler = ScriptedScheduler("c")
    front = scheduler.frontend()
    scheduler.hold_after = 0

    async def scenario(client: TestClient) -> list[int]:
        calls = [asyncio.ensure_future(client.get("/health_generate")) for _ in range(5)]
        while not scheduler.generates:
            await asyncio.sleep(0.01)
        calls[0].cancel()
        await asyncio.sleep(0.05)
        scheduler.hold_after = None
        scheduler._step(scheduler.generates[0], 0)
        return [(await call).status for call in calls[1:]]

    assert serve(front, scenario) == [200] * 4
    assert len(scheduler.generates) == 1


def test_health_generate_fails_without_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations, "PROBE_SECONDS", 0.05)
    scheduler = ScriptedScheduler("c")
    scheduler.hold_after = 0
    status, answer = get(scheduler.frontend(), "/health_generate")
    assert (status, answer["status"]) == (503, "failing")
    assert scheduler.front.router.open == 0


def test_health_generate_fails_while_the_model_loads() -> None:
    front = ScriptedScheduler("c").frontend()
    front.capacity = None
    assert get(front, "/health_generate")[0] == 503


@pytest.mark.parametrize("method", ["get", "post"])
def test_ping_tells_the_health(method: str) -> None:
    async def scenario(client: TestClient) -> int:
        async with getattr(client, method)("/ping") as answer:
            return answer.status

    assert serve(ScriptedScheduler("c").frontend(), scenario) == 200


def test_load_counts_open_requests() -> None:
    scheduler = ScriptedScheduler("c")
    scheduler.hold_after = 0
    front = scheduler.frontend()

    async def scenario(client: TestClient) -> int:
        call = asyncio.ensure_future(client.post("/v1/completions", json=COMPLETION | {"n": 3}))
        while len(scheduler.generates) < 3:
            await asyncio.sleep(0.01)
        async with client.get("/load") as answer:
            found: int = (await answer.json())["server_load"]
        call.cancel()
        return found

    assert serve(front, scenario) == 3
    assert ok(get(front, "/load")) == {"server_load": 0}


def test_loads_have_sglangs_shape() -> None:
    front = ScriptedScheduler("c").frontend(enable_lora=True, max_loras=4)
    front.handle(Stats(running=2, waiting=1, kv_pages=64, kv_pages_used=16, running_adapters={1: 1}))
    [load] = ok(get(front, "/v1/loads"))["loads"]
    assert (load["num_running_reqs"], load["num_waiting_reqs"], load["dp_rank"]) == (2, 1, 0)
    assert (load["num_used_tokens"], load["max_total_num_tokens"], load["token_usage"]) == (256, 1024, 0.25)
    assert load["lora"] == {"slots_used": 1, "slots_total": 4, "utilization": 0.25}


@pytest.mark.parametrize(("method", "path"), [("get", "flush_cache"), ("post", "flush_cache"),
                                              ("post", "reset_prefix_cache")])  # fmt: skip
def test_a_flush_separates_later_requests_from_earlier_ones(method: str, path: str) -> None:
    scheduler = ScriptedScheduler("c")
    front = scheduler.frontend()

    async def scenario(client: TestClient) -> None:
        for salt in ("", "mine"):
            await client.post("/v1/completions", json=COMPLETION | {"cache_salt": salt})
        for _ in range(2):
            async with getattr(client, method)(f"/{path}") as answer:
                assert answer.status == 200
            for salt in ("", "", "mine", "mine"):
                await client.post("/v1/completions", json=COMPLETION | {"cache_salt": salt})

    serve(front, scenario)
    salts = [generate.cache_salt for generate in scheduler.generates]
    assert len(set(salts)) == 6
    assert salts[2] == salts[3]
    assert salts[4] == salts[5]


def test_model_info_names_the_model() -> None:
    answer = ok(get(ScriptedScheduler("c").frontend(), "/model_info"))
    assert answer["model_path"] == answer["tokenizer_path"] == "/srv/base"
    assert answer["is_generation"] is True
    assert ok(get(ScriptedScheduler("c").frontend(), "/get_model_info")) == answer


def test_tokenizer_info_has_the_template_that_is_served() -> None:
    front = ScriptedScheduler("c").frontend()
    assert ok(get(front, "/tokenizer_info"))["chat_template"] == front.text_tools_for(None).chat.source


def test_server_info_has_vllms_shape_on_request() -> None:
    front = ScriptedScheduler("c").frontend(enable_lora=True, max_loras=4)
    config = ok(get(front, "/server_info?config_format=json"))["vllm_config"]
    assert config["lora_config"]["max_loras"] == 4
    assert config["model_config"]["dtype"] == "torch.float32"
    assert config["parallel_config"]["data_parallel_size"] == 1
    assert config["model_config"]["max_model_len"] == 512
    without = ok(get(ScriptedScheduler("c").frontend(), "/server_info?config_format=json"))
    assert without["vllm_config"]["lora_config"] is None
    assert error(get(front, "/server_info?config_format=yaml"))["param"] == "config_format"


def test_a_chat_is_rendered_without_generating() -> None:
    scheduler = ScriptedScheduler("c")
    body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 5, "temperature": 0.5, "request_id": "mine"}
    answer = ok(post(scheduler.frontend(), "/v1/chat/completions/render", body))
    assert answer["token_ids"] == [BOS, *b"user: a\nassistant:"]
    assert answer["request_id"] == "chatcmpl-mine"
    assert (answer["sampling_params"]["max_tokens"], answer["sampling_params"]["temperature"]) == (5, 0.5)
    assert not scheduler.generates
    assert error(post(scheduler.front, "/v1/chat/completions/render", body | {"top_p": 2}))["param"] == "top_p"


def references(value: Any) -> set[str]:
    """Returns the names of all schemas that `value` refers to."""
    return set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(value)))


def test_openapi_describes_every_route() -> None:
    found = ok(get(ScriptedScheduler("c").frontend(), "/openapi.json"))
    described = {(method.upper(), path) for path, one in found["paths"].items() for method in one}
    assert described == {(route.method, route.path.replace(":.+", "")) for route in ROUTES}
    assert references(found) <= set(found["components"]["schemas"])
    operations = [one for path in found["paths"].values() for one in path.values()]
    assert len({one["operationId"] for one in operations}) == len(operations)
    assert all(one["summary"] for one in operations)
    chat = found["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert {"temperature", "max_completion_tokens", "top_k"} <= set(chat["properties"])
    assert "messages" in found["components"]["schemas"]["ChatBody"]["properties"]


def test_docs_load_nothing_from_elsewhere() -> None:
    text = page(specification(ROUTES))
    assert all(route.path.split("{")[0] in text for route in ROUTES)
    assert not re.search(r"(?:src|href|url)\s*[=(]\s*[\"']?(?:https?:)?//", text)
    assert "<script" not in text
