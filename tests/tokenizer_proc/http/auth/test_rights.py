"""Every route declares the rights that it needs, and they hold for every method, kind of key and object.

The tests go over the routes of the application. A new route has to declare its rights, has to be listed in NAMES with
the ways in which a call of it names an adapter or a request, and is then held to EXPECTED like all others.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient
from fixtures.serving.api_calls import serve
from fixtures.serving.fake_frontend import FakeFrontend, config
from yarl import URL

from engine.config.api_keys import ApiKey
from tokenizer_proc.http.app import ROUTES, create_app
from tokenizer_proc.http.auth.rights import RIGHTS

KEYS = [
    ApiKey(key="a"),
    ApiKey(key="b"),
    ApiKey(key="team-1", tenant="team"),
    ApiKey(key="team-2", tenant="team"),
    ApiKey(key="ruled", adapters=["mine-*"]),
    ApiKey(key="operator", operator=True),
]
SERVERS: dict[str, dict[str, Any]] = {
    "no keys": {},
    "an admin key": {"admin_key": "admin"},
    "a sole key": {"api_keys": [ApiKey(key="sole")]},
    "a sole key with rules": {"api_keys": [ApiKey(key="a", requests_per_minute=1000)]},
    "keys": {"api_keys": KEYS},
    "keys and an admin key": {"api_keys": KEYS, "admin_key": "admin"},
    "a sole key and an admin key": {"api_keys": [ApiKey(key="a")], "admin_key": "admin"},
}
CALLERS = [None, "wrong", "a", "b", "ruled", "operator", "sole", "admin"]

OPEN, KEY, FORBIDDEN = None, 401, 403
Table = dict[str | None, int | None]  # by caller: the status of the refusal, or None; "*": every other caller
EXPECTED: dict[str, dict[str, Table]] = {  # by server, then by the declared right
    "no keys": {right: {"*": OPEN} for right in ("none", "inference", "own requests", "operator", "admin")},
    "an admin key": {
        "none": {"*": OPEN},
        "inference": {"*": OPEN},
        "own requests": {"*": KEY, "admin": OPEN},
        "operator": {"*": KEY, "admin": OPEN},
        "admin": {"*": KEY, "admin": OPEN},
    },
    "a sole key": {"none": {"*": OPEN}}
    | {right: {"*": KEY, "sole": OPEN} for right in ("inference", "own requests", "operator", "admin")},
    "a sole key with rules": {
        "none": {"*": OPEN},
        "inference": {"*": KEY, "a": OPEN},
        "own requests": {"*": KEY, "a": OPEN},
        "operator": {"*": KEY, "a": FORBIDDEN},
        "admin": {"*": KEY, "a": FORBIDDEN},
    },
    "keys": {
        "none": {"*": OPEN},
        "inference": {"*": KEY, "a": OPEN, "b": OPEN, "ruled": OPEN, "operator": OPEN},
        "own requests": {"*": KEY, "a": OPEN, "b": OPEN, "ruled": OPEN, "operator": OPEN},
        "operator": {"*": KEY, "a": FORBIDDEN, "b": FORBIDDEN, "ruled": FORBIDDEN, "operator": OPEN},
        "admin": {"*": KEY, "a": FORBIDDEN, "b": FORBIDDEN, "ruled": FORBIDDEN, "operator": OPEN},
    },
    "keys and an admin key": {
        "none": {"*": OPEN},
        "inference": {"*": OPEN, None: KEY, "wrong": KEY, "sole": KEY},
        "own requests": {"*": OPEN, None: KEY, "wrong": KEY, "sole": KEY},
        "operator": {"*": KEY, "a": FORBIDDEN, "b": FORBIDDEN, "ruled": FORBIDDEN, "operator": OPEN, "admin": OPEN},
        "admin": {"*": KEY, "a": FORBIDDEN, "b": FORBIDDEN, "ruled": FORBIDDEN, "operator": FORBIDDEN, "admin": OPEN},
    },
    "a sole key and an admin key": {
        "none": {"*": OPEN},
        "inference": {"*": KEY, "a": OPEN, "admin": OPEN},
        "own requests": {"*": KEY, "a": OPEN, "admin": OPEN},
        "operator": {"*": KEY, "a": FORBIDDEN, "admin": OPEN},
        "admin": {"*": KEY, "a": FORBIDDEN, "admin": OPEN},
    },
}
METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND"]

CHAT = {"messages": [{"role": "user", "content": "x"}]}
NO_NAMES: list[tuple[str, Any]] = []
NAMES: dict[str, list[tuple[str, Any]]] = {  # by path: (address, body) with $ for the name of an adapter
    "/v1/chat/completions": [
        ("", CHAT | {"model": "$"}),
        ("", CHAT | {"model": "base:$"}),
        ("", CHAT | {"model": "org/Base-1:$", "stream": True}),
        ("", CHAT | {"lora_path": "$"}),
        ("", CHAT | {"model": "mine-a", "lora_path": "$"}),
    ],
    "/v1/chat/completions/render": [("", CHAT | {"model": "$"}), ("", CHAT | {"lora_path": "$"})],
    "/v1/completions": [
        ("", {"prompt": "x", "model": "$"}),
        ("", {"prompt": ["x", "y"], "lora_path": ["mine-a", "$"]}),
        ("", {"prompt": "x", "lora_path": {"mine-a": 0.5, "$": 0.5}}),
    ],
    "/generate": [
        ("", {"text": "x", "lora_path": "$"}),
        ("", {"text": ["x", "y"], "lora_path": [None, "$"]}),
        ("", {"text": "x", "sampling_params": {"lora_path": "$"}}),
        ("", {"text": "x", "lora_path": {"mine-a": 0.5, "$": 0.5}}),
    ],
    "/tokenize": [("", {"prompt": "x", "model": "$"}), ("", {"prompt": "x", "lora_path": "$"})],
    "/detokenize": [("", {"tokens": [70], "model": "$"}), ("", {"tokens": [70], "lora_path": "$"})],
    "/v1/models": NO_NAMES,
    "/v1/models/{id}": [
        (address, None)
        for address in (
            "/v1/models/$",
            "/v1/models/base:$",
            "/v1/models/org%2FBase-1%3A$",
            "/v1/models/$?x=y",
            "/v1/models/$/",
            "/v1/models//$",
            "/v1//models/$",
            "//v1/models/$",
            "/v1/models/%24",
        )
    ],
    "/version": NO_NAMES,
    "/load": NO_NAMES,
    "/v1/loads": NO_NAMES,
    "/model_info": NO_NAMES,
    "/get_model_info": NO_NAMES,
    "/tokenizer_info": NO_NAMES,
}
"""Only routes for inference name adapters to callers who may not use all of them."""


def routes() -> list[tuple[str, str]]:
    """Returns the method and path of every route that the app serves."""
    app = create_app(FakeFrontend(), config())  # type: ignore[arg-type]
    return [(route.method, path_of(route)) for route in app.router.routes()]


def path_of(route: web.AbstractRoute) -> str:
    assert route.resource is not None
    return route.resource.canonical


def declared() -> dict[tuple[str, str], str]:
    app = create_app(FakeFrontend(), config())  # type: ignore[arg-type]
    return {(route.method, path_of(route)): app[RIGHTS][route].value for route in app.router.routes()}


def bearer(key: str | None) -> dict[str, str]:
    return {} if key is None else {"Authorization": f"Bearer {key}"}


def test_every_route_declares_its_rights() -> None:
    found = declared()
    assert set(found) == {(method, path) for method, path in routes()}
    assert {(route.method, route.path.replace(":.+", "")) for route in ROUTES} <= set(found)
    for route in ROUTES:
        assert found[route.method, route.path.replace(":.+", "")] == route.rights.value


def test_a_route_added_without_rights_is_for_admins() -> None:
    async def reveal(request: web.Request) -> web.Response:
        return web.Response(text="secret")

    async def scenario(client: TestClient) -> list[int]:
        statuses = []
        for key in ("a", "operator", "admin"):
            async with client.get("/added", headers=bearer(key)) as answer:
                statuses.append(answer.status)
        return statuses

    found = serve(FakeFrontend(), scenario, added=("/added", reveal), **SERVERS["keys and an admin key"])
    assert found == [403, 403, 200]


def expected(server: str, right: str, caller: str | None) -> int | None:
    table = EXPECTED[server][right]
    return table.get(caller, table["*"])


@pytest.mark.parametrize("server", SERVERS)
def test_rights_hold_for_every_route_method_and_key(server: str) -> None:
    rights = declared()
    cases = [(method, path) for path in {path for _, path in rights} | {"/nothing"} for method in METHODS]

    async def scenario(client: TestClient) -> list[str]:
        wrong = []
        for method, path in cases:
            right = rights.get((method, path), "inference")
            for caller in CALLERS:
                address = path.replace("{id}", "x_lora_adapter")
                async with client.request(method, address, json=[], headers=bearer(caller)) as answer:
                    got = answer.status if answer.status in (401, 403) else None
                    if got != expected(server, right, caller) or answer.status >= 500:
                        wrong.append(f"{method} {path} by {caller}: {answer.status}")
                    if (method, path) not in rights and got is None and answer.status not in (404, 405):
                        wrong.append(f"{method} {path} by {caller}: {answer.status}, but there is no such route")
        return wrong

    fields = {"runtime_loads": True} | SERVERS[server]
    assert serve(FakeFrontend("x_lora_adapter"), scenario, seconds=60, **fields) == []


def test_an_upgrade_needs_the_same_rights() -> None:
    async def scenario(client: TestClient) -> list[int]:
        found = []
        for path in ("/server_info", "/v1/models", "/nothing", "/health"):
            headers = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
            headers["Sec-WebSocket-Key"] = "dGhlIHNhbXBsZSBub25jZQ=="
            async with client.get(path, headers=headers) as answer:
                found.append(answer.status)
        return found

    assert serve(FakeFrontend(), scenario, **SERVERS["keys"]) == [401, 401, 401, 200]


@pytest.mark.parametrize("open_", [True, False])
def test_operators_change_adapters_only_where_allowed(open_: bool) -> None:
    async def scenario(client: TestClient) -> tuple[int, Any]:
        async with client.post("/load_lora_adapter", json=[], headers=bearer("operator")) as answer:
            return answer.status, await answer.json()

    status, answer = serve(FakeFrontend(), scenario, runtime_loads=open_, **SERVERS["keys"])
    assert status == (400 if open_ else 403)
    assert open_ or "--allow-runtime-lora-updating" in answer["error"]["message"]


def test_a_refused_key_is_told_which_key_it_needs() -> None:
    async def scenario(client: TestClient) -> list[str]:
        found = []
        for path in ("/load_lora_adapter", "/v1/unload_lora_adapter", "/pin_lora_adapter"):
            async with client.post(path, json={}, headers=bearer("a")) as answer:
                assert answer.status == 403
                found.append((await answer.json())["error"]["message"])
        return found

    for text in serve(FakeFrontend(), scenario, runtime_loads=True, **SERVERS["keys"]):
        assert '"operator": true' in text
        assert "--admin-api-key" in text


# ------------------------------------------------------------------------------------------------ adapters' names


def test_every_route_for_clients_says_how_it_names_adapters() -> None:
    clients = {path for (_, path), right in declared().items() if right == "inference"}
    assert clients == set(NAMES), "list a new route in NAMES, with every way in which a call names an adapter"


NAMED = [(path, address, body) for path, ways in NAMES.items() for address, body in ways]


def put(value: Any, name: str) -> Any:
    """Returns a body or an address with `name` in the place of $."""
    return json.loads(json.dumps(value).replace("$", name))


@pytest.mark.parametrize(("path", "address", "body"), NAMED)
@pytest.mark.parametrize("method", ["as declared", "HEAD", "OPTIONS", "PUT"])
def test_a_hidden_name_is_like_one_that_does_not_exist(path: str, address: str, body: Any, method: str) -> None:
    """Status, headers and body of all calls are equal but for the name: of the same length, hidden or unknown."""
    if method == "as declared":
        method = next(verb for verb, known in routes() if known == path)
    names = ["sekret", "Sekret", "%73ekret" if address else "sekre%74", "ghosts"]
    front = FakeFrontend("mine-a", "sekret")

    async def scenario(client: TestClient) -> list[tuple[int, dict[str, str], str]]:
        found = []
        for name in names:
            url = URL(f"http://127.0.0.1:{client.port}{put(address or path, name)}", encoded=True)
            headers = bearer("ruled") | {"X-Request-Id": "same"}
            async with client.session.request(method, url, json=put(body, name), headers=headers) as answer:
                text = (await answer.text()).replace(name, "$").replace("sekret", "$")
                kept = {k: v for k, v in answer.headers.items() if k not in ("Date", "Content-Length")}
                found.append((answer.status, kept, text))
        return found

    answers = serve(front, scenario, **SERVERS["keys"])
    assert answers[0][0] in (404, 405)
    for name, answer in zip(names, answers, strict=True):
        assert answer == answers[-1], name


def test_a_list_of_models_has_only_usable_ones() -> None:
    keys = [*KEYS, ApiKey(key="no-base", adapters=["mine-*"], base=False)]

    async def scenario(client: TestClient) -> dict[str, list[str]]:
        found = {}
        for key in ("a", "ruled", "no-base", "operator"):
            async with client.get("/v1/models", headers=bearer(key)) as answer:
                found[key] = [card["id"] for card in (await answer.json())["data"]]
        async with client.get("/v1/models/base", headers=bearer("no-base")) as answer:
            assert answer.status == 404
        return found

    bases = ["base", "org/Base-1"]
    assert serve(FakeFrontend("mine-a", "sekret"), scenario, api_keys=keys) == {
        "a": [*bases, "mine-a", "sekret"],
        "ruled": [*bases, "mine-a"],
        "no-base": ["mine-a"],
        "operator": [*bases, "mine-a", "sekret"],
    }


@pytest.mark.parametrize(
    "body",
    [{"model": "ghost"}, {"model": "base:ghost"}, {"lora_path": "ghost"}, {"lora_path": {"mine-a": 0.5, "ghost": 0.5}}],
)
def test_no_answer_and_no_log_line_lists_hidden_names(body: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")

    async def scenario(client: TestClient) -> dict[str, str]:
        found = {}
        for key in ("a", "ruled"):
            async with client.post("/v1/completions", json=body | {"prompt": "x"}, headers=bearer(key)) as answer:
                assert answer.status == 404
                found[key] = str(answer.headers) + await answer.text()
            found[key] += "".join(record.getMessage() for record in caplog.records)
            caplog.clear()
        return found

    found = serve(FakeFrontend("mine-a", "sekret"), scenario, **SERVERS["keys"])
    assert "sekret" in found["a"], "a key that may use every model is told some of them"
    assert "sekret" not in found["ruled"]


def test_an_adapter_that_leaves_meanwhile_shows_no_others() -> None:
    """An adapter may be unloaded between the check of a call's names and the start of its request."""
    front = FakeFrontend("mine-a", "sekret")
    text_tools_for = front.text_tools_for

    def unload(lora: Any) -> Any:
        front.adapters.take_name("mine-a")
        return text_tools_for(lora)

    front.text_tools_for = unload  # type: ignore[method-assign]

    async def scenario(client: TestClient) -> tuple[int, str]:
        body = {"prompt": "x", "model": "mine-a"}
        async with client.post("/v1/completions", json=body, headers=bearer("ruled")) as answer:
            return answer.status, await answer.text()

    status, text = serve(front, scenario, **SERVERS["keys"])
    assert status == 404
    assert "sekret" not in text


# ---------------------------------------------------------------------------------------------------- own requests


@pytest.mark.parametrize(
    ("owner", "caller", "ends"),
    [
        ("a", "a", True),
        ("a", "b", False),
        ("a", "ruled", False),
        ("a", "team-1", False),
        ("team-1", "team-2", True),
        ("team-1", "a", False),
        ("operator", "a", False),
        ("a", "operator", True),
        ("a", "admin", True),
        ("admin", "operator", True),
    ],
)
@pytest.mark.parametrize("abort", [{"rid": "r1"}, {"rid": ["r2", "r1"]}, {"abort_all": True}])
def test_a_key_aborts_its_own_requests(owner: str, caller: str, ends: bool, abort: dict[str, Any]) -> None:
    front = FakeFrontend()
    front.hold_after = 1

    async def scenario(client: TestClient) -> tuple[Any, Any, bool]:
        body = {"text": "x", "rid": "r1"}
        call = asyncio.ensure_future(client.post("/generate", json=body, headers=bearer(owner)))
        while not front.streams:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.02)
        async with client.post("/abort_request", json=abort, headers=bearer(caller)) as answer:
            told = answer.status, await answer.json()
        async with client.post("/abort_request", json={"rid": "ghost"}, headers=bearer(caller)) as answer:
            unknown = answer.status, await answer.json()
        is_cancelled = front.streams[0].is_cancelled
        front.streams[0].cancel()
        await call
        return told, unknown, is_cancelled

    told, unknown, is_cancelled = serve(front, scenario, **SERVERS["keys and an admin key"])
    assert is_cancelled is ends
    assert told == ((200, {"aborted": 1}) if ends else unknown)


def test_equal_ids_of_two_keys_do_not_meet() -> None:
    front = FakeFrontend()
    front.hold_after = 1

    async def scenario(client: TestClient) -> list[bool]:
        body = {"text": "x", "rid": "same"}
        calls = [asyncio.ensure_future(client.post("/generate", json=body, headers=bearer(key))) for key in ("a", "b")]
        while len(front.streams) < 2:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.02)
        async with client.post("/abort_request", json={"rid": "same"}, headers=bearer("b")) as answer:
            assert await answer.json() == {"aborted": 1}
        found = [stream.is_cancelled for stream in front.streams]
        for stream in front.streams:
            stream.cancel()
        await asyncio.gather(*calls)
        return found

    assert sorted(serve(front, scenario, **SERVERS["keys"])) == [False, True]
