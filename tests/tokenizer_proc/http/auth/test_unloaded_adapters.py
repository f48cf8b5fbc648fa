"""Calls that name adapters under --lora-resolve-root that are not loaded yet, with keys that may use some of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from aiohttp.test_utils import TestClient
from fixtures.serving.api_calls import serve
from fixtures.serving.loading_front import LoadingFront, adapter_dir

from engine.config.api_keys import ApiKey

KEYS = [ApiKey(key="k-team", tenant="team", adapters=["team-*"]), ApiKey(key="k-b", tenant="b", adapters=["b*"])]
CALLS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}),
    ("/v1/completions", {"prompt": ["hi", "ho"], "max_tokens": 1}),
    ("/tokenize", {"prompt": "hi"}),
    ("/detokenize", {"tokens": [5]}),
]


@pytest.fixture
def world(tmp_path: Path) -> LoadingFront:
    for name in ("team-a", "bird", "secret"):
        adapter_dir(tmp_path / "root" / name)
    return LoadingFront(lora_resolve_root=str(tmp_path / "root"))


def asked(world: LoadingFront, path: str, key: str, *bodies: dict[str, Any]) -> list[tuple[int, Any]]:
    """Returns status and body of calls with these bodies, sent one after the other."""

    async def scenario(client: TestClient) -> list[tuple[int, Any]]:
        found = []
        for body in bodies:
            async with client.post(path, json=body, headers={"Authorization": f"Bearer {key}"}) as answer:
                found.append((answer.status, await answer.json()))
        return found

    return serve(world.front, scenario, api_keys=KEYS)


def loaded(world: LoadingFront) -> list[str]:
    return [load.name for load in world.loads()]


@pytest.mark.parametrize(("path", "body"), CALLS)
@pytest.mark.parametrize("field", ["model", "lora_path"])
@pytest.mark.parametrize(("key", "name"), [("k-team", "team-a"), ("k-b", "bird")])
def test_an_adapter_that_a_key_may_use_is_loaded(
    world: LoadingFront, path: str, body: dict[str, Any], field: str, key: str, name: str
) -> None:
    named = f"base:{name}" if field == "model" else name
    [(status, answer)] = asked(world, path, key, body | {field: named})
    assert status == 200, answer
    assert loaded(world) == [name]


@pytest.mark.parametrize(("path", "body"), CALLS)
@pytest.mark.parametrize("names", [{"model": "base:secret"}, {"model": "secret"}, {"lora_path": "secret"}])
@pytest.mark.parametrize("key", ["k-team", "k-b"])
def test_an_adapter_that_a_key_may_not_use_is_not_loaded(
    world: LoadingFront, path: str, body: dict[str, Any], names: dict[str, str], key: str
) -> None:
    [(status, _)] = asked(world, path, key, body | names)
    assert status == 404
    assert loaded(world) == []


@pytest.mark.parametrize(
    "names",
    [
        {"model": "?"},
        {"model": "base:?"},
        {"lora_path": "?"},
        {"lora_path": {"team-a": 0.5, "?": 0.5}},
        {"model": "base:?", "lora_path": "team-a"},
        {"model": "team-a", "lora_path": "?"},
    ],
)
@pytest.mark.parametrize("key", ["k-team", "k-b"])
def test_refusals_do_not_show_which_adapters_exist(tmp_path: Path, names: dict[str, Any], key: str) -> None:
    """A loaded name, a name that could be loaded, and an unknown name are refused in the same words."""
    for name in ("team-a", "waiting"):
        adapter_dir(tmp_path / "root" / name)
    world = LoadingFront("secret", lora_resolve_root=str(tmp_path / "root"))

    def named(value: Any, name: str) -> Any:
        if isinstance(value, dict):
            return {each.replace("?", name): scale for each, scale in value.items()}
        return value.replace("?", name)

    path, body = CALLS[0]
    bodies = [
        body | {field: named(value, name) for field, value in names.items()} for name in ("secret", "waiting", "ghost")
    ]
    answers = asked(world, path, key, *bodies)
    assert [status for status, _ in answers] == [404, 404, 404]
    told = [
        {**answer["error"], "message": answer["error"]["message"].replace(name, "?")}
        for (_, answer), name in zip(answers, ("secret", "waiting", "ghost"), strict=True)
    ]
    assert told[0] == told[1] == told[2]
