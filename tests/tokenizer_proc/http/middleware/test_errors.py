"""Every error response has OpenAI's error body and the right status."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
from aiohttp import web
from aiohttp.http_exceptions import BadHttpMessage
from aiohttp.test_utils import TestClient
from fixtures.serving.api_calls import error, get, post, serve, stream
from fixtures.serving.fake_frontend import FakeFrontend

from engine.errors import EngineDead, Forbidden, InternalError, InvalidRequest, NotFound, Overloaded, Unauthorized
from tokenizer_proc.http.middleware import errors

CHAT = {"messages": [{"role": "user", "content": "a"}]}


def _send(data: bytes, content_type: str | None = "application/json", **fields: Any) -> tuple[int, Any]:
    async def scenario(client: TestClient) -> tuple[int, Any]:
        headers = {} if content_type is None else {"Content-Type": content_type}
        async with client.post("/v1/completions", data=data, headers=headers) as answer:
            assert answer.content_type == "application/json"
            return answer.status, json.loads(await answer.text())

    return serve(FakeFrontend(), scenario, **fields)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "empty"),
        (b"  ", "empty"),
        (b"{", "JSON"),
        (b'{"prompt": "a"', "JSON"),
        (b'{"prompt": "\xff"}', "JSON"),
        (b'{"temperature": NaN}', "JSON"),
        (b"[" * 200_000, "nested"),
        (b"[]", "object"),
        (b"null", "object"),
        (b'"text"', "object"),
    ],
)
def test_bodies_that_are_no_json_object_are_refused(data: bytes, says: str) -> None:
    assert says in error(_send(data))["message"]


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", None])
def test_other_content_types_are_refused(content_type: str | None) -> None:
    assert "Content-Type" in error(_send(b'{"prompt": "a"}', content_type))["message"]


def test_a_charset_is_accepted_in_the_content_type() -> None:
    assert _send(b'{"prompt": "a"}', "application/json; charset=utf-8")[0] == 200


def test_broken_compression_is_refused() -> None:
    async def scenario(client: TestClient) -> tuple[int, Any]:
        headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
        async with client.post("/v1/completions", data=b"not gzip", headers=headers) as answer:
            return answer.status, await answer.json()

    assert "cannot be read" in error(serve(FakeFrontend(), scenario))["message"]


def test_a_large_body_is_refused() -> None:
    found = error(_send(b'{"prompt": "' + b"a" * 5000 + b'"}', max_body_bytes=1000), 413)
    assert "1000" in found["message"]


def test_an_unknown_route_and_a_wrong_method_are_refused() -> None:
    assert error(get(FakeFrontend(), "/v2/nothing"), 404)["type"] == "not_found_error"
    assert error(get(FakeFrontend(), "/v1/completions"), 405)["code"] == "method_not_allowed"
    assert error(post(FakeFrontend(), "/health", {}), 405)["code"] == "method_not_allowed"


@pytest.mark.parametrize(
    ("refusal", "status"),
    [
        (InvalidRequest("no", param="x"), 400),
        (Unauthorized("no"), 401),
        (Forbidden("no"), 403),
        (NotFound("no", code="gone"), 404),
        (InternalError("no"), 500),
        (EngineDead("no"), 503),
    ],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/generate"])
def test_refusals_keep_their_status(refusal: Exception, status: int, path: str) -> None:
    frontend = FakeFrontend()
    frontend.refusal = refusal
    found = error(post(frontend, path, CHAT if "chat" in path else {"text": "a", "stream": True}), status)
    assert found["type"] == type(refusal).kind  # type: ignore[attr-defined]
    assert (found["param"], found["code"]) == (refusal.param, refusal.code)  # type: ignore[attr-defined]


def test_overload_has_a_retry_after() -> None:
    frontend = FakeFrontend()
    frontend.refusal = Overloaded("full", retry_after=2.5)

    async def scenario(client: TestClient) -> tuple[int, str, Any]:
        async with client.post("/v1/chat/completions", json=CHAT) as answer:
            return answer.status, answer.headers["Retry-After"], await answer.json()

    status, retry_after, body = serve(frontend, scenario)
    assert (status, retry_after) == (503, "3")
    assert body["error"]["code"] == "overloaded"


def test_the_unexpected_is_a_500_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    frontend = FakeFrontend()
    frontend.refusal = ZeroDivisionError("a secret")
    with caplog.at_level(logging.ERROR):
        found = error(post(frontend, "/v1/chat/completions", CHAT), 500)
    assert "secret" not in found["message"]
    assert any(record.exc_info and record.exc_info[0] is ZeroDivisionError for record in caplog.records)


@pytest.mark.parametrize(("failure", "kind"), [(NotFound("gone"), "not_found_error"), (KeyError("x"), "server_error")])
@pytest.mark.parametrize("n", [1, 2])
def test_an_error_in_mid_stream_is_the_last_event(
    failure: Exception, kind: str, n: int, caplog: pytest.LogCaptureFixture
) -> None:
    frontend = FakeFrontend()
    frontend.fail_after, frontend.failure = 2, failure
    found = stream(frontend, "/v1/completions", {"prompt": ["a"] * n})
    assert len(found) >= 2
    assert found[-1]["error"]["type"] == kind
    assert all("error" not in event for event in found[:-1])
    assert frontend.left == n


def test_an_error_before_an_unstreamed_answer_has_its_status() -> None:
    frontend = FakeFrontend()
    frontend.fail_after, frontend.failure = 2, EngineDead("gone")
    error(post(frontend, "/v1/completions", {"prompt": ["a", "b"]}), 503)
    assert frontend.left == 2


def test_one_refused_prompt_releases_the_other_prompts() -> None:
    frontend = FakeFrontend("x")
    error(post(frontend, "/v1/completions", {"prompt": [[1], [2], [999]]}))
    assert (len(frontend.streams), frontend.left) == (3, 2)


def test_every_answer_has_a_request_id() -> None:
    async def scenario(client: TestClient) -> list[str]:
        ids = []
        unsound = {"X-Request-Id": "é"}
        for path, headers in [("/health", {"X-Request-Id": "mine-1"}), ("/health", unsound), ("/nothing", {})]:
            async with client.get(path, headers=headers) as answer:
                ids.append(answer.headers["X-Request-Id"])
        body = CHAT | {"stream": True}
        async with client.post("/v1/chat/completions", json=body, headers={"X-Request-Id": "mine-2"}) as answer:
            ids.append(answer.headers["X-Request-Id"])
        return ids

    mine, made, other, streamed = serve(FakeFrontend(), scenario)
    assert (mine, streamed) == ("mine-1", "mine-2")
    assert len({made, other, "é"}) == 3


@pytest.mark.parametrize(
    ("fault", "shown"),
    [(BadHttpMessage("no HTTP"), False), (web.RequestPayloadError("cut"), False), (ValueError("ours"), True)],
)
def test_malformed_requests_are_not_logged_as_server_faults(fault: Exception, shown: bool) -> None:
    record = logging.LogRecord("aiohttp.server", logging.ERROR, "", 0, "", (), (type(fault), fault, None))
    assert errors.is_server_fault(record) is shown
    assert errors.is_server_fault(logging.LogRecord("aiohttp.server", logging.ERROR, "", 0, "", (), None))
