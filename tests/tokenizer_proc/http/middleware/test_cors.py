"""Which web pages of other origins a browser lets call the server."""

from __future__ import annotations

from typing import Any

import pytest
from aiohttp.test_utils import TestClient
from fixtures.serving.api_calls import serve
from fixtures.serving.fake_frontend import FakeFrontend

from engine.config.api_keys import ApiKey
from engine.config.cors import Cors

PAGE = "https://example.org"
PREFLIGHT = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}


def answer(cors: Cors, method: str, path: str, headers: dict[str, str], **fields: Any) -> tuple[int, dict[str, str]]:
    """Returns the status of a call, and the headers of its answer that are about origins."""

    async def scenario(client: TestClient) -> tuple[int, dict[str, str]]:
        async with client.request(method, path, headers=headers) as found:
            shown = {name: value for name, value in found.headers.items() if name.startswith("Access-Control")}
            return found.status, shown

    return serve(FakeFrontend(), scenario, cors=cors, **fields)


def test_no_origin_is_allowed_by_default() -> None:
    status, headers = answer(Cors(), "OPTIONS", "/v1/models", {"Origin": PAGE} | PREFLIGHT)
    assert (status, headers) == (405, {})
    assert answer(Cors(), "GET", "/v1/models", {"Origin": PAGE}) == (200, {})


@pytest.mark.parametrize("origin", ["https://example.com", "http://example.org", "https://example.org:8443", "null"])
def test_other_origins_get_no_header(origin: str) -> None:
    cors = Cors(origins=[PAGE])
    assert answer(cors, "GET", "/v1/models", {"Origin": origin}) == (200, {})
    assert answer(cors, "OPTIONS", "/v1/models", {"Origin": origin} | PREFLIGHT) == (405, {})


def test_an_allowed_origin_is_named_also_in_errors() -> None:
    cors = Cors(origins=[PAGE])
    for path, expected in (("/v1/models", 200), ("/nowhere", 404)):
        status, headers = answer(cors, "GET", path, {"Origin": PAGE})
        assert (status, headers["Access-Control-Allow-Origin"]) == (expected, PAGE)
        assert "Access-Control-Allow-Credentials" not in headers


def test_a_preflight_needs_no_key_and_a_call_does() -> None:
    cors, keys = Cors(origins=[PAGE]), [ApiKey(key="k")]
    status, headers = answer(cors, "OPTIONS", "/generate", {"Origin": PAGE} | PREFLIGHT, api_keys=keys)
    assert status == 204
    assert headers["Access-Control-Allow-Methods"] == "GET, HEAD, POST"
    assert headers["Access-Control-Allow-Headers"] == "authorization"
    status, headers = answer(cors, "GET", "/v1/models", {"Origin": PAGE}, api_keys=keys)
    assert (status, headers["Access-Control-Allow-Origin"]) == (401, PAGE)


def test_every_origin_is_allowed_by_a_star() -> None:
    assert answer(Cors(origins=["*"]), "GET", "/ready", {"Origin": PAGE})[1]["Access-Control-Allow-Origin"] == "*"
    headers = answer(Cors(origins=["*"], credentials=True), "GET", "/ready", {"Origin": PAGE})[1]
    assert headers["Access-Control-Allow-Origin"] == PAGE
    assert headers["Access-Control-Allow-Credentials"] == "true"


def test_listed_methods_and_headers_are_told() -> None:
    cors = Cors(origins=[PAGE], methods=["POST"], headers=["Authorization", "Content-Type"])
    headers = answer(cors, "OPTIONS", "/generate", {"Origin": PAGE} | PREFLIGHT)[1]
    assert headers["Access-Control-Allow-Methods"] == "POST"
    assert headers["Access-Control-Allow-Headers"] == "Authorization, Content-Type"
