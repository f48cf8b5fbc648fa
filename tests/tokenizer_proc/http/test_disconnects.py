"""A client that disconnects releases its stream at once, without an error, whatever the client waited for."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import pytest
from aiohttp import web
from fixtures.serving.fake_frontend import FakeFrontend, config

from tokenizer_proc.http.app import create_app

CALLS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
    ("/v1/completions", {"prompt": ["a", "b"], "n": 2}),
    ("/generate", {"text": "a"}),
    ("/generate", {"text": ["a", "b", "c"]}),
]


async def _left(frontend: FakeFrontend, count: int) -> None:
    while frontend.left < count:
        await asyncio.sleep(0.005)


async def _hang_up(frontend: FakeFrontend, path: str, body: dict[str, Any], cancels: bool = True) -> None:
    """Sends a request over a real socket, closes it while the response is held back, and waits for the release.

    Without `cancels` the handler is not cancelled: it notices the disconnect when its next write fails.
    """
    runner = web.AppRunner(create_app(frontend, config()), handler_cancellation=cancels)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(data)}\r\n\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(head.encode() + data)
    if body.get("stream"):
        await reader.readuntil(b"data: ")
    else:
        await asyncio.sleep(0.05)
    assert frontend.streams
    assert frontend.left == 0
    writer.transport.abort()
    if not cancels:
        await asyncio.sleep(0.02)
        assert frontend.left == 0
        frontend.streams[0].cancel()  # produces one more delta
    await asyncio.wait_for(_left(frontend, len(frontend.streams)), 5)
    await runner.cleanup()


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize(("path", "body"), CALLS)
def test_a_disconnect_releases_everything(
    path: str, body: dict[str, Any], is_stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    frontend = FakeFrontend()
    frontend.hold_after = 2
    with caplog.at_level(logging.INFO):
        asyncio.run(_hang_up(frontend, path, body | {"stream": is_stream}))
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING or record.exc_info]


def test_a_write_that_fails_ends_the_stream_quietly(caplog: pytest.LogCaptureFixture) -> None:
    frontend = FakeFrontend()
    frontend.hold_after = 2
    with caplog.at_level(logging.INFO):
        asyncio.run(_hang_up(frontend, "/v1/chat/completions", CALLS[0][1] | {"stream": True}, cancels=False))
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING or record.exc_info]
