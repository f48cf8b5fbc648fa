"""A client that waits with its body is told to send it once its rights are checked, and may leave before that."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any, cast

import pytest
from aiohttp import ClientConnectionResetError, web
from aiohttp.http import HttpVersion11
from fixtures.connections.raw_http import head, served
from fixtures.serving.fake_frontend import FakeFrontend

from engine.config.api_keys import ApiKey
from tokenizer_proc.http.middleware import expectations

BODY = json.dumps({"prompt": "a b"}).encode()
WAITS = "Expect: 100-continue"


async def _call(*lines: str, keys: tuple[ApiKey, ...] = ()) -> tuple[int, int]:
    """Returns the status of the final answer and the number of answers before it."""
    async with served(FakeFrontend(), api_keys=keys) as server:
        client = await server.connect()
        await client.send(head("/tokenize", len(BODY), *lines))
        if not keys and WAITS in lines:
            await client.send(BODY)
        answer = await client.answer()
        return answer.status, answer.interim


def test_a_client_that_waits_is_told_to_send_its_body() -> None:
    assert asyncio.run(_call(WAITS)) == (200, 1)


def test_a_client_without_rights_is_not_asked_for_its_body() -> None:
    assert asyncio.run(_call(WAITS, keys=(ApiKey(key="k"),))) == (401, 0)


def test_an_unknown_expectation_is_a_400() -> None:
    assert asyncio.run(_call("Expect: a miracle")) == (400, 0)


def test_a_client_that_has_left_is_no_fault(caplog: pytest.LogCaptureFixture) -> None:
    class Gone:
        output_size = 0

        async def write(self, data: bytes) -> None:
            raise ClientConnectionResetError("Cannot write to closing transport")

    class Request:
        headers = {"Expect": "100-continue"}  # noqa: RUF012
        version = HttpVersion11
        writer = Gone()

    async def handler(_: Any) -> web.StreamResponse:
        return web.Response(status=204)

    caplog.set_level(logging.WARNING)
    answer = asyncio.run(cast(Any, expectations.middleware)(Request(), handler))
    assert answer.status == 204
    assert not caplog.records
