"""A server on a loopback address takes calls only under names of this machine, whatever the call is."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest
from aiohttp.test_utils import TestClient
from fixtures.serving.api_calls import serve
from fixtures.serving.fake_frontend import FakeFrontend

from engine.config.api_keys import ApiKey
from engine.config.server_args import ServerArgs
from engine.errors import ConfigError
from tokenizer_proc.http.app import ROUTES
from tokenizer_proc.http.auth.hosts import host_name, is_loopback

OURS = [
    "127.0.0.1",
    "127.0.0.1:30000",
    "127.8.8.8",
    "localhost",
    "LocalHost:80",
    "localhost.",
    "localhost:",
    "foo.localhost:1",
    "[::1]",
    "[::1]:80",
    "[0:0:0:0:0:0:0:1]",
    "[::ffff:127.0.0.1]:80",
]
FOREIGN = [
    "evil.example",
    "EVIL.example.",
    "127.0.0.1.evil.example:30000",
    "localhost.evil.example",
    "evillocalhost",
    "xn--localhost-9za",
    "10.0.0.7",
    "[::2]",
    "[::ffff:10.0.0.7]",
    "0.0.0.0",
    "2130706433",
]
MALFORMED = [
    "",
    ".localhost",
    "evil..localhost",
    "localhost..",
    "localhost:port",
    "localhost:99999",
    "localhost:65536",
    "localhost:-1",
    "localhost:80:80",
    "localhost,evil.example",
    "a@127.0.0.1",
    "user:pass@localhost",
    "127.0.0.1%00.evil.com",
    "127.0.0.1%2eevil.com",
    "localhost/evil",
    "localhost#evil",
    "localhost?evil",
    "localhost\\evil",
    "local host",
    "localhost\t",
    "::1",
    "[::1",
    "[::1%lo]",
    "[::1%25lo]",
    "[::1].evil.example",
    "[127.0.0.1]",
    "[1.2]",
    "[]",
    "lo\u00e7alhost",
    "\uff4cocalhost",
    "localhost:\u0663",
    "a" * 300,
]


def refused(line: str | None, *, target: str = "/health", version: str = "1.1", **fields: Any) -> tuple[int, str]:
    """Returns status and text of a call whose Host lines are `line`, as they stand."""

    async def scenario(client: TestClient) -> tuple[int, str]:
        reader, writer = await asyncio.open_connection("127.0.0.1", client.port)
        head = (
            f"GET {target} HTTP/{version}\r\n" + ("" if line is None else f"{line}\r\n") + "Connection: close\r\n\r\n"
        )
        writer.write(head.encode("utf-8"))
        data = (await reader.read()).decode()
        writer.close()
        return int(data.split()[1]), data

    return serve(FakeFrontend(), scenario, **fields)


@pytest.mark.parametrize("authority", OURS)
def test_names_of_this_machine_are_taken(authority: str) -> None:
    name = host_name(authority)
    assert name is not None
    assert is_loopback(name)


@pytest.mark.parametrize("authority", FOREIGN)
def test_foreign_names_are_no_loopback(authority: str) -> None:
    name = host_name(authority)
    assert name is not None
    assert not is_loopback(name)


@pytest.mark.parametrize("authority", [*MALFORMED, *(f"localhost{chr(code)}" for code in range(33))])
def test_a_malformed_host_is_no_name(authority: str) -> None:
    assert host_name(authority) is None


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "OPTIONS", "DELETE"])
def test_every_call_is_checked(method: str) -> None:
    """Also probes, calls of unknown paths, and calls with an operator's key."""
    paths = [*{route.path.replace("{id:.+}", "base") for route in ROUTES}, "/nothing"]

    async def scenario(client: TestClient) -> set[int]:
        found = set()
        for path in paths:
            for key in ("sole", "wrong"):
                headers = {"Host": "evil.example", "Authorization": f"Bearer {key}"}
                async with client.request(method, path, json=[], headers=headers) as answer:
                    found.add(answer.status)
        return found

    assert serve(FakeFrontend(), scenario, runtime_loads=True, api_keys=[ApiKey(key="sole")]) == {403}


def test_the_refusal_says_which_flag_to_use() -> None:
    status, text = refused("Host: llm.example.com")
    assert status == 403
    assert "--allowed-hosts llm.example.com" in text
    assert '"code":"bad_host"' in text


@pytest.mark.parametrize(
    ("line", "statuses"),
    [
        ("Host: localhost", {200}),
        ("hOST:   LOCALHOST:123   ", {200}),
        ("Host: 127.0.0.1%00.evil.com", {403}),
        ("Host: a@localhost", {403}),
        ("Host: ", {400, 403}),
        ("Host: localhost\r\nHost: evil.example", {400, 403}),
        ("Host: evil.example\r\nHost: localhost", {400, 403}),
        ("Host: localhost\x00evil.example", {400, 403}),
        ("Host: localhost\u00e7", {400, 403}),
        (None, {400, 403}),
    ],
)
def test_host_lines_are_read_as_they_stand(line: str | None, statuses: set[int]) -> None:
    assert refused(line)[0] in statuses


def test_a_call_of_http_1_0_may_name_no_host() -> None:
    assert refused(None, version="1.0")[0] == 200
    assert refused("Host: evil.example", version="1.0")[0] == 403


@pytest.mark.parametrize(
    ("target", "line", "statuses"),
    [
        ("http://localhost/health", "Host: localhost", {200}),
        ("http://evil.example/health", "Host: localhost", {403}),
        ("http://evil.example:80/health", "Host: localhost", {403}),
        ("HTTP://evil.example/health", "Host: localhost", {400, 403}),
        ("http://a@localhost/health", "Host: localhost", {400, 403}),
        ("http://localhost/health", "Host: evil.example", {403}),
        ("//evil.example/health", "Host: localhost", {404}),
    ],
)
def test_an_absolute_target_is_checked_too(target: str, line: str, statuses: set[int]) -> None:
    assert refused(line, target=target)[0] in statuses


@pytest.mark.parametrize(
    ("allowed", "host", "status"),
    [
        (["llm.example.com"], "llm.example.com", 200),
        (["llm.example.com"], "LLM.example.com.:443", 200),
        (["LLM.example.com"], "llm.example.com", 200),
        (["llm.example.com"], "localhost", 200),
        (["llm.example.com"], "evil.example", 403),
        (["llm.example.com"], "x.llm.example.com", 403),
        (["*.example.com"], "a.b.example.com", 200),
        (["*.example.com"], "example.com", 403),
        (["*.example.com"], "badexample.com", 403),
        (["[::2]"], "[::2]:80", 200),
        (["10.0.0.7"], "10.0.0.7", 200),
        (["*"], "evil.example", 200),
        (["*"], "a@evil.example", 200),
    ],
)
@pytest.mark.parametrize("bound", ["127.0.0.1", "0.0.0.0"])
def test_allowed_hosts_are_taken_beside_loopback(allowed: list[str], host: str, status: int, bound: str) -> None:
    assert refused(f"Host: {host}", allowed_hosts=allowed, server_info={"host": bound})[0] == status


def test_other_binds_take_every_host() -> None:
    for host in ("evil.example", "a_b:8000", "10.0.0.7"):
        assert refused(f"Host: {host}", server_info={"host": "0.0.0.0"})[0] == 200


@pytest.mark.parametrize(("bound", "status"), [("127.0.0.1", 403), ("0.0.0.0", 200)])
def test_a_name_that_resolves_to_loopback_is_bound_to_it(bound: str, status: int) -> None:
    with socket.socket() as listener:
        listener.bind((bound, 0))
        fields: dict[str, Any] = {"server_info": {"host": "my-machine"}, "listen_fd": listener.fileno()}
        assert refused("Host: evil.example", **fields)[0] == status
        assert refused("Host: My-Machine:80", **fields)[0] == 200


@pytest.mark.parametrize("host", ["http://x", "x:80", "a b", "", "*x", "x/*", "a..b"])
def test_allowed_hosts_are_names_without_ports(host: str) -> None:
    with pytest.raises(ConfigError, match="--allowed-hosts"):
        ServerArgs(allowed_hosts=["ok.example", host])
