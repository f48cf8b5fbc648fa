"""Every route declares the rights that it needs, and the rights hold for every caller."""

from __future__ import annotations

from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient
from fixtures.serving.api_calls import serve
from fixtures.serving.fake_frontend import FakeFrontend, config

from engine.config.api_keys import ApiKey
from tokenizer_proc.http.app import create_app
from tokenizer_proc.http.auth.rights import RIGHTS

KEYS = [ApiKey(key="ruled", tenant="team", adapters=["team-*"]), ApiKey(key="free")]
CALLERS = [None, "wrong", "ruled", "free", "root"]

NEEDS = {
    "/health": "none",
    "/ready": "none",
    "/metrics": "none",
    "/health_generate": "none",
    "/ping": "none",
    "/openapi.json": "none",
    "/docs": "none",
    "/v1/chat/completions/render": "inference",
    "/load": "inference",
    "/v1/loads": "inference",
    "/model_info": "inference",
    "/get_model_info": "inference",
    "/tokenizer_info": "inference",
    "/flush_cache": "operator",
    "/reset_prefix_cache": "operator",
    "/v1/chat/completions": "inference",
    "/v1/completions": "inference",
    "/v1/models": "inference",
    "/v1/models/{id}": "inference",
    "/generate": "inference",
    "/tokenize": "inference",
    "/detokenize": "inference",
    "/version": "inference",
    "/server_info": "operator",
    "/get_server_info": "operator",
    "/abort_request": "operator",
    "/load_lora_adapter": "admin",
    "/unload_lora_adapter": "admin",
    "/pin_lora_adapter": "admin",
    "/unpin_lora_adapter": "admin",
    "/load_lora_adapter_from_tensors": "admin",
    "/v1/load_lora_adapter": "admin",
    "/v1/unload_lora_adapter": "admin",
}
REFUSED = {  # rights of a route: status of the refusal for each of CALLERS; None: the call is admitted
    "none": [None, None, None, None, None],
    "inference": [401, 401, None, None, 401],
    "operator": [401, 401, 403, None, 401],
    "admin": [401, 401, 401, 401, None],
    "admin without an admin key": [401, 401, 403, None, 401],
}


def routes() -> list[tuple[str, str]]:
    """Returns the method and path of every route that the app serves."""
    app = create_app(FakeFrontend(), config())  # type: ignore[arg-type]
    return [(route.method, path_of(route)) for route in app.router.routes()]


def path_of(route: web.AbstractRoute) -> str:
    assert route.resource is not None
    return route.resource.canonical


def refusals(method: str, path: str, **fields: Any) -> list[int | None]:
    """Returns the status with which the app refuses each of the callers; None: the call is admitted."""

    async def scenario(client: TestClient) -> list[int | None]:
        found: list[int | None] = []
        for key in CALLERS:
            headers = {} if key is None else {"Authorization": f"Bearer {key}"}
            async with client.request(method, path, json=[], headers=headers) as answer:
                assert answer.status < 500
                found.append(answer.status if answer.status in (401, 403) else None)
        return found

    return serve(FakeFrontend("x_lora_adapter"), scenario, api_keys=KEYS, **fields)


def test_every_route_declares_its_rights() -> None:
    app = create_app(FakeFrontend(), config())  # type: ignore[arg-type]
    declared = {path_of(route): app[RIGHTS][route].value for route in app.router.routes()}
    assert declared == NEEDS


@pytest.mark.parametrize(("method", "path"), routes())
def test_rights_hold_for_every_caller(method: str, path: str) -> None:
    needs, address = NEEDS[path], path.replace("{id}", "x_lora_adapter")
    assert refusals(method, address, admin_key="root") == REFUSED[needs]
    without = f"{needs} without an admin key"
    assert refusals(method, address, runtime_loads=True) == REFUSED.get(without, REFUSED[needs])


def test_a_path_without_a_route_needs_a_key() -> None:
    for path in ("/nothing", "/nothing/load_lora_adapter", "/health/"):
        assert refusals("GET", path, admin_key="root") == REFUSED["inference"]
