"""API keys: admission, visible adapters, and rates."""

from __future__ import annotations

import json
from typing import Any

import pytest
from aiohttp.test_utils import TestClient
from fixtures.serving.api_calls import serve
from fixtures.serving.fake_frontend import FakeFrontend
from fixtures.serving.tokenizer_front import Fake

from engine.config.api_keys import ApiKey
from tokenizer_proc.frontend import Frontend

RULED = ApiKey(key="k-team", tenant="team", adapters=["team-*"])
FREE = ApiKey(key="k-free")
CHAT = {"messages": [{"role": "user", "content": "hi"}]}


def ask(
    front: FakeFrontend | Frontend, calls: list[tuple[str, str, str | None, Any]], *keys: ApiKey, **fields: Any
) -> list[tuple[int, Any]]:
    """Returns status and body of each (method, path, key, body) call; one server with `keys` gets them in order."""

    async def scenario(client: TestClient) -> list[tuple[int, Any]]:
        found = []
        for method, path, key, body in calls:
            headers = {} if key is None else {"Authorization": f"Bearer {key}"}
            async with client.request(method, path, json=body, headers=headers) as answer:
                text = await answer.text()
                found.append((answer.status, json.loads(text) if text.startswith("{") else text))
        return found

    return serve(front, scenario, api_keys=list(keys), **fields)


def test_without_keys_every_call_is_admitted() -> None:
    assert ask(FakeFrontend(), [("POST", "/v1/chat/completions", None, CHAT)])[0][0] == 200


@pytest.mark.parametrize("key", [None, "wrong", "", "k-free-and-more", "K-FREE"])
@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/v1/chat/completions"), ("POST", "/generate"), ("GET", "/v1/models"), ("GET", "/server_info")],
)
def test_calls_without_a_valid_key_are_refused(method: str, path: str, key: str | None) -> None:
    [(status, answer)] = ask(FakeFrontend(), [(method, path, key, None)], FREE, RULED)
    assert status == 401
    assert answer["error"]["code"] == "invalid_api_key"


def test_probes_need_no_key() -> None:
    calls: list[tuple[str, str, str | None, Any]] = [
        ("GET", path, None, None) for path in ("/health", "/ready", "/metrics")
    ]
    assert [status for status, _ in ask(FakeFrontend(), calls, FREE)] == [200, 200, 200]


def test_an_adapter_a_key_may_not_use_does_not_exist_for_it() -> None:
    front = FakeFrontend("team-a", "secret")
    generate = {"text": "x", "lora_path": "secret"}
    answers = ask(
        front,
        [
            ("GET", "/v1/models", "k-team", None),
            ("GET", "/v1/models/secret", "k-team", None),
            ("POST", "/v1/chat/completions", "k-team", {**CHAT, "model": "secret"}),
            ("POST", "/v1/chat/completions", "k-team", {**CHAT, "model": "ghost"}),
            ("POST", "/v1/chat/completions", "k-team", {**CHAT, "model": "base:secret"}),
            ("POST", "/v1/completions", "k-team", {"prompt": "x", "lora_path": {"team-a": 0.5, "secret": 0.5}}),
            ("POST", "/generate", "k-team", generate),
            ("POST", "/tokenize", "k-team", {"prompt": "x", "model": "secret"}),
            ("POST", "/v1/chat/completions", "k-team", {**CHAT, "model": "team-a"}),
            ("POST", "/generate", "k-free", generate),
        ],
        FREE,
        RULED,
    )
    assert [status for status, _ in answers] == [200, 404, 404, 404, 404, 404, 404, 404, 200, 200]
    assert [card["id"] for card in answers[0][1]["data"]] == ["base", "org/Base-1", "team-a"]
    hidden, unknown = answers[2][1]["error"], answers[3][1]["error"]
    assert hidden["message"].replace("secret", "?") == unknown["message"].replace("ghost", "?")
    assert "secret" not in unknown["message"]


def test_requests_carry_their_tenant() -> None:
    front = FakeFrontend("team-a")
    calls = [("POST", "/generate", key, {"text": "x", "lora_path": "team-a"}) for key in ("k-team", "k-free")]
    ask(front, calls, FREE, RULED)
    assert [submit.tenant for submit in front.submits] == ["team", ""]


def test_a_base_that_a_key_may_not_use_is_not_found() -> None:
    ruled = ApiKey(key="k", adapters=["a"], base=False)
    answers = ask(
        FakeFrontend("a"), [("POST", "/generate", "k", {"text": "x", "lora_path": lora}) for lora in (None, "a")], ruled
    )
    assert [status for status, _ in answers] == [404, 200]


@pytest.mark.parametrize(("path", "body"), [("/v1/completions", {"prompt": "x"}), ("/tokenize", {"prompt": "x"})])
def test_a_hidden_base_is_like_a_name_that_does_not_exist(path: str, body: dict[str, Any]) -> None:
    ruled = ApiKey(key="k", adapters=["a"], base=False)
    calls = [("POST", path, "k", body | {"model": name}) for name in ("base", "ghost", "a", "base:a")]
    [hidden, unknown, *used] = ask(FakeFrontend("a"), calls, ruled)
    assert (hidden[0], unknown[0]) == (404, 404)
    assert str(hidden[1]).replace("base", "?") == str(unknown[1]).replace("ghost", "?")
    assert [status for status, _ in used] == [200, 200]


def test_a_model_named_like_an_admin_route_needs_a_key() -> None:
    front = FakeFrontend("x_lora_adapter")
    front.adapters.base_names.append("base_lora_adapter")
    calls = [
        ("GET", f"/v1/models/{name}_lora_adapter", key, None)
        for name in ("x", "base", "none")
        for key in (None, "k-free")
    ]
    answers = ask(front, calls, FREE, admin_key="root")
    assert [status for status, _ in answers] == [401, 200, 401, 200, 401, 404]


@pytest.mark.parametrize(
    ("rights", "statuses", "shown"),
    [
        ("open", {None: 200, "k-team": 200, "k-free": 200, "k-op": 200, "root": 200}, set(range(5))),
        ("hide-adapters", {None: 200, "k-team": 200, "k-free": 200, "k-op": 200, "root": 200}, {3, 4}),
        ("operator", {None: 401, "k-team": 403, "k-free": 403, "k-op": 200, "root": 200}, {3, 4}),
    ],
)
def test_metrics_name_adapters_to_those_with_the_rights(rights: str, statuses: dict[Any, int], shown: set[int]) -> None:
    front = Fake("canary").front
    calls: list[tuple[str, str, str | None, Any]] = [("GET", "/metrics", key, None) for key in statuses]
    keys = [FREE, RULED, ApiKey(key="k-op", operator=True)]
    answers = ask(front, calls, *keys, admin_key="root", metrics_rights=rights)
    assert [status for status, _ in answers] == list(statuses.values())
    assert {place for place, (_, text) in enumerate(answers) if "canary" in str(text)} == shown
