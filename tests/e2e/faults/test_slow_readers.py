"""Clients that never read: other requests are not delayed, memory stays bounded, and their resources are freed."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fixtures.processes.resources import private_bytes
from fixtures.serving.running import RunningServer

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

SLOW_READERS = 12
BUFFER_BYTES = 256 << 10


def _body(**fields: Any) -> dict[str, Any]:
    """Returns a request for cumulative events with logprobs: tens of megabytes, more than the kernel buffers."""
    params = {"max_new_tokens": 200, "ignore_eos": True, "temperature": 0}
    return {
        "input_ids": [5, 6, 7], "sampling_params": params, "return_logprob": True, "top_logprobs_num": 20, **fields
    }  # fmt: skip


def _ask(server: RunningServer, name: str) -> socket.socket:
    """Opens a connection, sends a request, and reads nothing."""
    host, port = server.url.removeprefix("http://").split(":")
    data = json.dumps(_body(stream=True)).encode()
    head = f"POST /generate HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nX-Request-Id: {name}\r\n"
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect((host, int(port)))
    client.sendall(head.encode() + f"Content-Length: {len(data)}\r\n\r\n".encode() + data)
    return client


def _read(client: socket.socket) -> None:
    """Reads until the connection ends."""
    while client.recv(1 << 20):
        pass


def test_clients_that_never_read_are_disconnected(tiny_model: Callable[[str], Path]) -> None:
    flags = ["--model-path", tiny_model("llama3"), "--max-stream-buffer", BUFFER_BYTES, "--max-running-requests", 16]
    with RunningServer(*flags, "--dtype", "float32") as server:
        undisturbed = server.post("/generate", _body())
        assert undisturbed[0] == 200
        server.wait_idle()
        before = sum(map(private_bytes, server.children()))
        clients = [_ask(server, f"slow-{number}") for number in range(SLOW_READERS)]
        most = 0
        deadline = time.monotonic() + 120
        while server.log().count("kind=slow_reader") < SLOW_READERS:
            assert time.monotonic() < deadline, server.log()[-3000:]
            assert server.post("/generate", _body())[1]["output_ids"] == undisturbed[1]["output_ids"]
            most = max(most, sum(map(private_bytes, server.children())))
        server.wait_idle()
        assert most - before < SLOW_READERS * 4 * BUFFER_BYTES + (64 << 20), f"{most - before} bytes more"
        for number, client in enumerate(clients):
            assert f"id=slow-{number} " in server.log()
            with client, pytest.raises(ConnectionResetError):
                _read(client)
        assert server.get("/server_info")["open_requests"] == 0
        assert "Traceback" not in server.log()
