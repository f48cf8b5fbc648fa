"""Every call ends in one log line with its response's request id, and without the client's texts and keys."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient
from fixtures.serving.api_calls import serve
from fixtures.serving.fake_frontend import FakeFrontend, config
from fixtures.serving.scripted_scheduler import ScriptedScheduler

from engine.config.api_keys import ApiKey
from engine.errors import EngineDead, InternalError, Overloaded, TimedOut
from tokenizer_proc.http.app import create_app
from tokenizer_proc.http.middleware import access_log

CANARY = "CANARY7f3a"
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": CANARY}], "max_tokens": 2}
JSON = {"Content-Type": "application/json"}


@pytest.fixture(autouse=True)
def _ours_alone(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("CRITICAL", "aiohttp.access")  # silences the log of the test's own server


def fields(message: str) -> dict[str, str]:
    """Returns the fields of a log line."""
    pairs = re.findall(r'(\w+)=("(?:[^"\\]|\\.)*"|\S+)', message)
    return {key: json.loads(value) if value.startswith('"') else value for key, value in pairs}


def lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, str]]:
    """Returns the access-log lines of the calls so far, and clears them."""
    found = [fields(each.getMessage()) for each in caplog.records if each.getMessage().startswith("call ")]
    caplog.clear()
    return found


REFUSALS: list[tuple[str, str, bytes, dict[str, str], int, str]] = [
    ("POST", "/v1/chat/completions", b"{" + CANARY.encode(), JSON, 400, "invalid_request_error"),
    ("POST", "/v1/chat/completions", json.dumps(CHAT | {"temperature": "hot"}).encode(), JSON, 400,
     "invalid_request_error"),
    ("POST", "/v1/chat/completions", json.dumps(CHAT | {"model": "ghost"}).encode(), JSON, 404, "not_found_error"),
    ("POST", "/v1/chat/completions", json.dumps({"messages": [{"role": CANARY, "content": "a"}]}).encode(), JSON, 400,
     "invalid_request_error"),
    ("POST", "/v1/completions", json.dumps({"prompt": {"a": CANARY}}).encode(), JSON, 400, "invalid_request_error"),
    ("POST", "/v1/completions", json.dumps({"prompt": "a", "stop": [CANARY] * 99}).encode(), JSON, 400,
     "invalid_request_error"),
    ("POST", "/v1/completions", json.dumps({"prompt": CANARY, "max_tokens": 1 << 30}).encode(), JSON, 400,
     "invalid_request_error"),
    ("POST", "/generate", json.dumps({"text": CANARY * 1000}).encode(), JSON, 400, "invalid_request_error"),
    ("POST", "/generate", json.dumps({"text": CANARY, "lora_path": "ghost"}).encode(), JSON, 404, "not_found_error"),
    ("POST", "/tokenize", json.dumps({"messages": [{"role": "user", "content": {"a": CANARY}}]}).encode(), JSON, 400,
     "invalid_request_error"),
    ("POST", "/generate", b"text=" + CANARY.encode(), {"Content-Type": "text/plain"}, 400, "invalid_request_error"),
    ("POST", "/generate", b" " * 3000, JSON, 413, "invalid_request_error"),
    ("POST", "/load_lora_adapter", b"{}", JSON, 403, "permission_error"),
    ("POST", "/v1/unload_lora_adapter", b"{}", JSON, 403, "permission_error"),
    ("GET", "/nothing?key=" + CANARY, b"", {}, 404, "not_found_error"),
    ("GET", "/generate", b"", {}, 405, "invalid_request_error"),
    ("GET", "/v1/models/ghost", b"", {}, 404, "not_found_error"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "path", "data", "headers", "status", "kind"), REFUSALS)
def test_a_refusal_is_one_line_with_the_clients_id(
    method: str, path: str, data: bytes, headers: dict[str, str], status: int, kind: str,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    frontend = ScriptedScheduler("ok!", "sql").frontend()

    async def scenario(client: TestClient) -> list[str]:
        ids = []
        for given in ({}, {"X-Request-Id": "mine 1"}):
            async with client.request(method, path, data=data, headers=headers | given) as answer:
                assert answer.status == status, await answer.text()
                ids.append(answer.headers["X-Request-Id"])
        return ids

    with caplog.at_level(logging.INFO):
        ids = serve(frontend, scenario, max_body_bytes=20_000 if b"CAN" in data else 2000)
    assert CANARY not in caplog.text
    found = lines(caplog)
    assert [each["id"] for each in found] == ids
    assert ids[1] == "mine 1"
    for each in found:
        assert each["method"] == method
        assert each["path"] == path.partition("?")[0]
        assert (each["status"], each["kind"]) == (str(status), kind)
        assert each["message"]


@pytest.mark.parametrize("refusal", [Overloaded("full"), EngineDead("gone"), TimedOut("late"), InternalError("lost")])
@pytest.mark.parametrize("stream", [False, True])
def test_an_embedded_hosts_call_is_one_line(refusal: Exception, stream: bool, caplog: pytest.LogCaptureFixture) -> None:
    before, midway = FakeFrontend(), FakeFrontend()
    before.refusal = midway.failure = refusal
    midway.fail_after = 1

    async def scenario(client: TestClient) -> tuple[int, str]:
        async with client.post("/v1/chat/completions", json=CHAT | {"stream": stream}) as answer:
            await answer.read()
            return answer.status, answer.headers["X-Request-Id"]

    for frontend in (before, midway):
        with caplog.at_level(logging.INFO):
            status, given = serve(frontend, scenario)
        level = caplog.records[-1].levelno
        (line,) = lines(caplog)
        assert (line["id"], line["status"], line["kind"]) == (given, str(status), type(refusal).kind)  # type: ignore[attr-defined]
        assert level == (logging.ERROR if isinstance(refusal, InternalError) else logging.INFO)


@pytest.mark.parametrize("header", [None, "Bearer wrong" + CANARY])
def test_a_key_is_never_shown(header: str | None, caplog: pytest.LogCaptureFixture) -> None:
    headers = {} if header is None else {"Authorization": header}

    async def scenario(client: TestClient) -> None:
        async with client.post("/generate", json={"text": "a"}, headers=headers) as answer:
            assert answer.status == 401
        right = {"Authorization": f"Bearer {CANARY}"}
        async with client.post("/generate", json={"text": "a"}, headers=right) as answer:
            assert answer.status == 200

    with caplog.at_level(logging.DEBUG):
        serve(FakeFrontend(), scenario, api_keys=[ApiKey(key=CANARY, tenant="t")])
    assert CANARY not in caplog.text
    assert [line.get("kind") for line in lines(caplog)] == ["authentication_error", None]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/generate"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_finished_request_is_one_line(path: str, stream: bool, caplog: pytest.LogCaptureFixture) -> None:
    bodies: dict[str, dict[str, Any]] = {
        "/v1/chat/completions": CHAT | {"model": "sql"},
        "/v1/completions": {"model": "sql", "prompt": CANARY, "max_tokens": 2},
        "/generate": {"text": CANARY, "lora_path": "sql", "sampling_params": {"max_new_tokens": 2}},
    }

    async def scenario(client: TestClient) -> None:
        headers = {"X-Request-Id": "mine"}
        async with client.post(path, json=bodies[path] | {"stream": stream}, headers=headers) as answer:
            assert answer.status == 200
            await answer.read()

    with caplog.at_level(logging.DEBUG):
        serve(ScriptedScheduler("ok!", "sql").frontend(), scenario)
    assert CANARY not in caplog.text
    (line,) = lines(caplog)
    assert line.items() >= {"id": "mine", "status": "200", "lora": "sql", "tokens": "2", "finish": "length"}.items()
    assert int(line["prompt"]) > 5
    assert float(line["seconds"]) >= 0


def test_a_client_that_disconnects_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    scheduler = ScriptedScheduler("x" * 50)
    scheduler.hold_after = 3
    frontend = scheduler.frontend()

    async def main() -> None:
        runner = web.AppRunner(create_app(frontend, config()), handler_cancellation=True)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        data = json.dumps({"text": "a", "stream": True}).encode()
        head = "POST /generate HTTP/1.1\r\nHost: localhost\r\nX-Request-Id: mine\r\nContent-Type: application/json\r\n"
        reader, writer = await asyncio.open_connection(*runner.addresses[0])
        writer.write(head.encode() + f"Content-Length: {len(data)}\r\n\r\n".encode() + data)
        for _ in range(3):
            await reader.readuntil(b"data: ")
        writer.transport.abort()
        async with asyncio.timeout(10):
            while frontend.router.open or not any("end=gone" in each.getMessage() for each in caplog.records):
                await asyncio.sleep(0.01)
        await runner.cleanup()

    with caplog.at_level(logging.INFO):
        asyncio.run(main())
    (line,) = lines(caplog)
    assert line.items() >= {"id": "mine", "end": "gone", "tokens": "3", "finish": "none"}.items()


def test_look_ups_are_logged_at_debug_level(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(client: TestClient) -> None:
        for path in ("/health", "/ready", "/metrics", "/v1/models"):
            async with client.get(path) as answer:
                assert answer.status == 200

    for level, count in ((logging.INFO, 0), (logging.DEBUG, 4)):
        with caplog.at_level(level):
            serve(FakeFrontend(), scenario)
        assert len(lines(caplog)) == count


@pytest.mark.parametrize("given", ["é", "x" * 257, "x" * 8000, " ", "\t"])
def test_an_unsound_request_id_is_replaced(given: str, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(client: TestClient) -> str:
        async with client.get("/nothing", headers={"X-Request-Id": given}) as answer:
            return answer.headers["X-Request-Id"]

    with caplog.at_level(logging.INFO):
        shown = serve(FakeFrontend(), scenario)
    assert re.fullmatch("[0-9a-f]{32}", shown)
    assert [line["id"] for line in lines(caplog)] == [shown]


@pytest.mark.parametrize(
    "data",
    [
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Request-Id: a\nstatus=200\r\nb\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Request-Id: " + b"x" * 10_000 + b"\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"nothing of the kind\r\n\r\n",
    ],
)
def test_a_malformed_request_is_one_line(data: bytes, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> bytes:
        runner = web.AppRunner(
            create_app(FakeFrontend(), config()),
            access_log=access_log.log,
            access_log_class=access_log.MalformedRequestLogger,
        )
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        reader, writer = await asyncio.open_connection(*runner.addresses[0])
        writer.write(data)
        answer = await asyncio.wait_for(reader.read(), 10)
        writer.close()
        await runner.cleanup()
        return answer

    caplog.set_level("CRITICAL", "aiohttp.server")
    caplog.set_level("INFO", "tokenizer_proc")
    assert asyncio.run(main()).startswith((b"HTTP/1.1 400", b"HTTP/1.0 400"))
    assert [(line["status"], line["kind"]) for line in lines(caplog)] == [("400", "bad_http")]


def test_every_refusal_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    frontend = FakeFrontend()
    frontend.refusal = Overloaded("full")

    async def scenario(client: TestClient) -> None:
        async def one() -> None:
            async with client.post("/v1/chat/completions", json=CHAT) as answer:
                assert answer.status == 503

        for _ in range(10):
            await asyncio.gather(*(one() for _ in range(50)))

    with caplog.at_level(logging.INFO):
        serve(frontend, scenario)
    assert len({line["id"] for line in lines(caplog)}) == 500
