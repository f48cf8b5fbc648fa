"""Adapter calls over real HTTP: both dialects' bodies and statuses, rights, and clients that disconnect."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer
from fixtures.serving.loading_front import LoadingFront, adapter_dir

from tokenizer_proc.adapters import lifecycle as lifecycle_module
from tokenizer_proc.http.app import create_app
from tokenizer_proc.http.routes.lora import LoadBody

KEY = "opensesame"


def serve(world: LoadingFront, scenario: Callable[[TestClient], Awaitable[Any]]) -> Any:
    async def main() -> Any:
        server = TestServer(create_app(world.front, world.config))
        async with TestClient(server) as client:
            return await asyncio.wait_for(scenario(client), 20)

    return asyncio.run(main())


async def post(client: TestClient, path: str, body: Any, **headers: str) -> tuple[int, Any]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    sent = {"Content-Type": "application/json", **{name.replace("_", "-"): value for name, value in headers.items()}}
    async with client.post(path, data=data, headers=sent) as answer:
        text = await answer.text()
        return answer.status, json.loads(text) if answer.content_type == "application/json" else text


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.002)


@pytest.fixture
def a(tmp_path: Path) -> str:
    return str(adapter_dir(tmp_path / "a"))


def test_sglangs_dialect(a: str) -> None:
    world = LoadingFront("first")
    given = {"first": "given/first"}

    async def scenario(client: TestClient) -> None:
        body = {"lora_name": "a", "lora_path": a, "lora_id": "ignored"}
        assert await post(client, "/load_lora_adapter", body) == (
            200,
            {"success": True, "error_message": "", "loaded_adapters": {**given, "a": a}},
        )
        status, refusal = await post(client, "/load_lora_adapter", body)
        assert status == 400
        assert refusal["success"] is False
        assert "already been loaded" in refusal["error_message"]
        assert refusal["loaded_adapters"] == {**given, "a": a}
        assert refusal["error"]["message"] == refusal["error_message"]
        assert set(refusal["error"]) == {"message", "type", "param", "code"}
        for path, pinned in (("/pin_lora_adapter", True), ("/unpin_lora_adapter", False)):
            status, answer = await post(client, path, {"lora_name": "a"})
            assert (status, answer["success"]) == (200, True)
            async with client.get("/v1/models/a") as card:
                assert (await card.json())["pinned"] is pinned
        done = 200, {"success": True, "error_message": "", "loaded_adapters": given}
        assert await post(client, "/unload_lora_adapter", {"lora_name": "a"}) == done
        body = {"lora_name": "p", "lora_path": a, "pinned": True, "preload": True}
        status, answer = await post(client, "/load_lora_adapter", body)
        assert (status, set(answer)) == (200, {"success", "error_message", "loaded_adapters"})
        assert (world.loads()[-1].pinned, world.loads()[-1].preload) == (True, True)

    serve(world, scenario)


def test_vllms_dialect(a: str, tmp_path: Path) -> None:
    world = LoadingFront()
    two = str(adapter_dir(tmp_path / "two"))

    async def scenario(client: TestClient) -> None:
        body = {"lora_name": "a", "lora_path": a}
        added = 200, "Success: LoRA adapter 'a' added successfully."
        assert await post(client, "/v1/load_lora_adapter", body) == added
        status, refusal = await post(client, "/v1/load_lora_adapter", body)
        assert (status, set(refusal)) == (400, {"error"})
        assert refusal["error"]["message"] == (
            "The lora adapter 'a' has already been loaded. If you want to load the adapter in place, set "
            "'load_inplace' to True."
        )
        again = {"lora_name": "a", "lora_path": two, "load_inplace": True, "is_3d_lora_weight": False}
        assert await post(client, "/v1/load_lora_adapter", again) == added
        async with client.get("/v1/models") as answer:
            card = (await answer.json())["data"][1]
        assert (card["id"], card["root"], card["lora_int_id"], card["state"]) == ("a", two, 2, "host")
        status, refusal = await post(client, "/v1/unload_lora_adapter", {"lora_name": "a", "lora_int_id": 1})
        assert (status, refusal["error"]["param"]) == (400, "lora_int_id")
        world.busy = {2}  # the response does not wait until the adapter is unused
        removed = 200, "Success: LoRA adapter 'a' removed successfully."
        assert await post(client, "/v1/unload_lora_adapter", {"lora_name": "a", "lora_int_id": 2}) == removed
        status, refusal = await post(client, "/v1/unload_lora_adapter", {"lora_name": "a"})
        assert (status, set(refusal)) == (404, {"error"})
        assert "The lora adapter 'a' cannot be found" in refusal["error"]["message"]
        async with client.get("/v1/models/a") as answer:
            assert (await answer.json())["state"] == "draining"

    serve(world, scenario)


LOAD, V1_LOAD, UNLOAD, V1_UNLOAD = (
    "/load_lora_adapter",
    "/v1/load_lora_adapter",
    "/unload_lora_adapter",
    "/v1/unload_lora_adapter",
)


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        (V1_LOAD, {"lora_name": "", "lora_path": "p"}, 400, "lora_name"),
        (V1_LOAD, {"lora_name": "x", "lora_path": ""}, 400, "lora_path"),
        (V1_LOAD, {"lora_name": "x"}, 400, "lora_path"),
        (V1_LOAD, {"lora_path": "x"}, 400, "lora_name"),
        (V1_LOAD, {"lora_name": 3, "lora_path": "x"}, 400, "lora_name"),
        (V1_LOAD, {"lora_name": "x", "lora_path": ["x"]}, 400, "lora_path"),
        (V1_LOAD, {"lora_name": "x", "lora_path": "p", "is_3d_lora_weight": True}, 400, "is_3d_lora_weight"),
        (V1_LOAD, {"lora_name": "x", "lora_path": "p", "load_inplace": "yes"}, 400, "load_inplace"),
        (V1_LOAD, {"lora_name": "x", "lora_path": "p", "surprise": 1}, 400, "surprise"),
        (V1_LOAD, {"lora_name": "base", "lora_path": "p"}, 400, "lora_name"),
        (V1_LOAD, {"lora_name": "x", "lora_path": "/no/such"}, 404, "lora_path"),
        (V1_LOAD, {"lora_name": "x", "lora_path": "BROKEN"}, 400, "lora_path"),
        (V1_LOAD, {"lora_name": "x", "lora_path": "BROKEN", "load_inplace": True}, 400, "lora_path"),
        (V1_LOAD, b"[]", 400, None),
        (V1_LOAD, b"{", 400, None),
        (V1_LOAD, b"", 400, None),
        (V1_UNLOAD, {"lora_name": ""}, 400, "lora_name"),
        (V1_UNLOAD, {"lora_name": "nobody"}, 404, "lora_name"),
        (V1_UNLOAD, {"lora_name": "first", "lora_int_id": 9}, 400, "lora_int_id"),
        (V1_UNLOAD, {"lora_name": "first", "lora_int_id": "1"}, 400, "lora_int_id"),
        (LOAD, {"lora_name": "x", "lora_path": "/no/such"}, 400, "lora_path"),
        (LOAD, {"lora_name": "x", "lora_path": "BROKEN"}, 400, "lora_path"),
        (LOAD, {"lora_name": "x"}, 400, "lora_path"),
        (LOAD, {"lora_name": "x", "lora_path": "p", "load_inplace": True}, 400, "load_inplace"),
        (LOAD, b"nonsense", 400, None),
        (UNLOAD, {"lora_name": "nobody"}, 400, "lora_name"),
        (UNLOAD, {}, 400, "lora_name"),
        ("/pin_lora_adapter", {"lora_name": "nobody"}, 400, "lora_name"),
        ("/unpin_lora_adapter", {"lora_name": "nobody"}, 400, "lora_name"),
        ("/load_lora_adapter_from_tensors", {"lora_name": "x", "config_dict": {}}, 400, None),
    ],
)
def test_bad_adapter_calls_are_refused(path: str, body: Any, status: int, param: str | None, tmp_path: Path) -> None:
    world = LoadingFront("first")
    broken = str(adapter_dir(tmp_path / "broken"))
    world.refuse[broken] = "rank 4096 is above --max-lora-rank 64"
    if isinstance(body, dict) and body.get("lora_path") == "BROKEN":
        body = body | {"lora_path": broken}

    async def scenario(client: TestClient) -> None:
        got, answer = await post(client, path, body)
        assert got == status, answer
        assert answer["error"]["param"] == param
        if path.startswith("/v1"):
            assert set(answer) == {"error"}
        else:
            assert answer["success"] is False
            assert answer["error_message"] == answer["error"]["message"]
            assert answer["loaded_adapters"] == {"first": "given/first"}
        async with client.get("/v1/models") as models:
            assert [card["id"] for card in (await models.json())["data"]] == ["base", "first"]

    serve(world, scenario)


def test_lora_off(a: str) -> None:
    async def scenario(client: TestClient) -> None:
        for path, body in (
            (LOAD, {"lora_name": "a", "lora_path": a}),
            (V1_LOAD, {"lora_name": "a", "lora_path": a}),
            (UNLOAD, {"lora_name": "a"}),
            (V1_UNLOAD, {"lora_name": "a"}),
        ):
            status, answer = await post(client, path, body)
            assert status == 400
            assert "--enable-lora" in answer["error"]["message"]

    serve(LoadingFront(enable_lora=False), scenario)


def test_unload_answers_when_memory_is_free_or_after_a_while(a: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert lifecycle_module.FREED_SECONDS == 60.0
    world = LoadingFront("first", "second")
    world.busy = {1, 2}

    async def scenario(client: TestClient) -> None:
        unload = asyncio.ensure_future(post(client, UNLOAD, {"lora_name": "first"}))
        await asyncio.sleep(0.1)
        assert not unload.done()
        world.free(1)
        status, answer = await unload
        assert (status, "state" in answer) == (200, False)
        monkeypatch.setattr(lifecycle_module, "FREED_SECONDS", 0.05)
        status, answer = await post(client, UNLOAD, {"lora_name": "second"})
        assert (status, answer["success"], answer["state"]) == (200, True, "draining")
        assert answer["loaded_adapters"] == {}

    serve(world, scenario)


def test_preload_that_takes_too_long_says_where_it_is(a: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifecycle_module, "PRELOAD_SECONDS", 0.05)
    world = LoadingFront()
    world.resident = False

    async def scenario(client: TestClient) -> None:
        status, answer = await post(client, LOAD, {"lora_name": "a", "lora_path": a, "preload": True})
        assert (status, answer["success"], answer["state"]) == (200, True, "host")

    serve(world, scenario)


def test_a_load_goes_on_when_its_client_disconnects(a: str) -> None:
    world = LoadingFront()
    world.held = True

    async def scenario(client: TestClient) -> None:
        load = asyncio.ensure_future(post(client, LOAD, {"lora_name": "a", "lora_path": a}))
        await until(lambda: world.open_loads)
        load.cancel()
        await asyncio.gather(load, return_exceptions=True)
        await asyncio.sleep(0.05)  # the server has seen the disconnect
        world.finish()
        await until(lambda: world.front.adapters.find("a"))
        assert world.unloads() == []
        status, _ = await post(client, UNLOAD, {"lora_name": "a"})
        assert status == 200

    serve(world, scenario)


OPEN = {"lora_name": "nobody"}  # an unknown adapter: an admitted caller gets a 404


@pytest.mark.parametrize(
    ("fields", "headers", "status"),
    [
        ({}, {}, 404),
        ({"runtime_loads": False}, {}, 403),
        ({"runtime_loads": False}, {"Authorization": "Bearer x"}, 403),
        ({"admin_key": KEY}, {}, 401),
        ({"admin_key": KEY}, {"Authorization": "Bearer wrong"}, 401),
        ({"admin_key": KEY}, {"Authorization": f"Basic {KEY}"}, 401),
        ({"admin_key": KEY}, {"Authorization": KEY}, 401),
        ({"admin_key": KEY}, {"Authorization": f"Bearer {KEY}"}, 404),
        ({"admin_key": KEY}, {"Authorization": f"bearer  {KEY}"}, 404),
        ({"admin_key": KEY, "runtime_loads": False}, {"Authorization": f"Bearer {KEY}"}, 404),
        ({"admin_key": KEY, "runtime_loads": False}, {}, 401),
        ({}, {"Host": "localhost:30000"}, 404),
        ({}, {"Host": "[::1]:80"}, 404),
        ({}, {"Host": "127.8.8.8"}, 404),
        ({}, {"Host": "evil.example"}, 403),
        ({}, {"Host": "127.0.0.1.evil.example:30000"}, 403),
        ({}, {"Host": "localhost:port"}, 403),
        ({}, {"Host": "a@127.0.0.1"}, 403),
        ({"server_info": {"host": "127.0.0.1"}}, {"Host": "10.0.0.7"}, 403),
        ({"server_info": {"host": "0.0.0.0"}}, {"Host": "serving.example"}, 404),
        ({"server_info": {"host": "0.0.0.0"}, "runtime_loads": False}, {"Host": "serving.example"}, 403),
        ({}, {"Content-Type": "text/plain"}, 400),
        ({}, {"Content-Type": "application/x-www-form-urlencoded"}, 400),
    ],
)
def test_adapter_calls_need_a_key_or_loopback(fields: dict[str, Any], headers: dict[str, str], status: int) -> None:
    world = LoadingFront(**fields)

    async def scenario(client: TestClient) -> None:
        for path in (LOAD, V1_LOAD, UNLOAD, V1_UNLOAD, "/pin_lora_adapter", "/unpin_lora_adapter"):
            await knock(client, path)

    async def knock(client: TestClient, path: str) -> None:
        body = OPEN | ({"lora_path": "/no/such"} if path.endswith("/load_lora_adapter") else {})
        expected = 400 if status == 404 and not path.startswith("/v1") else status
        got, answer = await post(client, path, body, **headers)
        assert got == expected, answer
        assert answer["error"]["message"]
        if got == 403 and "Host" not in headers:
            for way in ("--allow-runtime-lora-updating", "VLLM_ALLOW_RUNTIME_LORA_UPDATING", "--admin-api-key"):
                assert way in answer["error"]["message"]
            assert "loopback" in answer["error"]["message"]
        if got in (401, 403):
            assert set(answer) == {"error"}
            assert KEY not in json.dumps(answer)

    serve(world, scenario)


def test_generating_routes_load_from_the_resolve_root(tmp_path: Path) -> None:
    for name in ("one", "two", "three", "four"):
        adapter_dir(tmp_path / "root" / name)
    world = LoadingFront(lora_resolve_root=str(tmp_path / "root"))

    async def scenario(client: TestClient) -> None:
        asked = [
            ("/v1/chat/completions", {"model": "one", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}),
            ("/v1/completions", {"model": "base:two", "prompt": "x", "max_tokens": 1}),
            ("/generate", {"text": ["x", "y"], "lora_path": ["three", None], "sampling_params": {"max_new_tokens": 1}}),
            ("/tokenize", {"model": "four", "prompt": "x"}),
        ]
        for path, body in asked:
            status, answer = await post(client, path, body)
            assert status == 200, answer
        assert set(world.front.adapters.paths()) == {"one", "two", "three", "four"}
        status, answer = await post(client, "/v1/completions", {"model": "five", "prompt": "x"})
        assert (status, answer["error"]["code"]) == (404, "model_not_found")

    serve(world, scenario)


def test_pool_facts_and_metrics_are_shown(a: str) -> None:
    world = LoadingFront("first")

    async def scenario(client: TestClient) -> None:
        await post(client, LOAD, {"lora_name": "a", "lora_path": a, "preload": True})
        async with client.get("/server_info") as answer:
            assert (await answer.json())["lora_pool"] == {"qkv": {"pages": 8, "used": 0, "page_bytes": 0}}
        async with client.get("/metrics") as answer:
            text = await answer.text()
        for line in (
            'chorus:adapter_tier{adapter="a",tier="resident"} 1.0',
            'chorus:adapter_tier{adapter="first",tier="host"} 1.0',
            'chorus:adapter_load_seconds_count{model_name="base"} 1.0',
            'chorus:adapter_fill_seconds_sum{model_name="base"} 0.25',
            'chorus:lora_pool_pages{group="qkv"} 8.0',
            'running_lora_adapters="a",waiting_lora_adapters=""',
        ):
            assert line in text, line
        await post(client, UNLOAD, {"lora_name": "a"})
        async with client.get("/metrics") as answer:
            assert 'adapter="a"' not in await answer.text()

    serve(world, scenario)


def test_the_body_has_sglangs_fields() -> None:
    assert {"lora_name", "lora_path", "pinned"} <= set(LoadBody.__struct_fields__)
