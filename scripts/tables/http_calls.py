"""The table of HTTP calls, from the routes of the application and the docstrings of their handlers."""

from __future__ import annotations

import inspect
from collections import defaultdict
from functools import partial
from typing import Any, cast

from aiohttp import web

from engine.config.process_configs import Endpoints, TokenizerConfig
from tables.markdown import table
from tokenizer_proc.frontend import Frontend
from tokenizer_proc.http.app import create_app
from tokenizer_proc.http.auth.rights import RIGHTS


def http_calls() -> str:
    """Returns a table with one row for each handler, in the order in which the routes were added."""
    app = application()
    paths: dict[Any, list[str]] = defaultdict(list)
    rights: dict[Any, str] = {}
    for route in app.router.routes():
        if route.method != "HEAD":  # every GET route also handles HEAD
            assert route.resource is not None
            handler = _handler(route)
            paths[handler].append(f"`{route.method} {route.resource.canonical}`")
            rights[handler] = app[RIGHTS][route].value
    rows = [(", ".join(paths[handler]), rights[handler], summary(handler)) for handler in paths]
    return table(("call", "rights", "what it does"), rows)


def application() -> web.Application:
    """Returns the application without a front end behind it, so that its routes can be listed."""
    endpoints = Endpoints(**dict.fromkeys(Endpoints.__struct_fields__, ""))
    config = TokenizerConfig(endpoints=endpoints, model_path="", tokenizer_path="", served_model_names=["base"])
    return create_app(cast(Frontend, None), config)


def summary(handler: Any) -> str:
    """Returns the first paragraph of a handler's docstring."""
    text = inspect.getdoc(handler)
    if not text:
        raise ValueError(f"{handler.__module__}.{handler.__name__} has no docstring")
    return " ".join(text.split("\n\n")[0].split())


def _handler(route: web.AbstractRoute) -> Any:
    handler = route.handler
    while isinstance(handler, partial):
        handler = handler.func
    return handler
