"""The routes /openapi.json and /docs: the description of all calls, made of the structs that decode their bodies."""

from __future__ import annotations

import html
import inspect
import re
from collections.abc import Iterable
from functools import partial
from typing import Any

import msgspec
from aiohttp import web

from engine.messages import SamplingParams
from tokenizer_proc.http.encoding import as_json
from tokenizer_proc.http.routes.operations import installed_version
from tokenizer_proc.http.routes.route import Route
from tokenizer_proc.http.service import Service

Schema = dict[str, Any]

SPECIFICATION: web.AppKey[Schema] = web.AppKey("specification", dict)
"""The key under which an application stores the description of its calls."""

_REFERENCE = "#/components/schemas/{name}"
_STYLE = (
    "body{font:15px/1.5 sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "pre{background:#f4f4f4;padding:1rem;overflow:auto}summary{cursor:pointer;padding:.3rem 0}"
    "code{font-weight:bold}"
)


async def openapi(service: Service, request: web.Request) -> web.StreamResponse:
    """Returns the description of all calls in OpenAPI's format."""
    return as_json(request.app[SPECIFICATION])


async def docs(service: Service, request: web.Request) -> web.StreamResponse:
    """Returns the same description as a page that loads nothing from elsewhere."""
    return web.Response(text=page(request.app[SPECIFICATION]), content_type="text/html")


def specification(routes: Iterable[Route]) -> Schema:
    """Returns the OpenAPI description of `routes`."""
    listed = list(routes)
    bodies = {route.body: None for route in listed if route.body is not None}
    _, schemas = msgspec.json.schema_components(
        [*bodies, SamplingParams],
        schema_hook=lambda _: {"description": "any value"},  # of fields of type object
        ref_template=_REFERENCE,
    )
    paths: Schema = {}
    for route in listed:
        path = re.sub(r"\{(\w+)(:[^}]*)?\}", r"{\1}", route.path)
        paths.setdefault(path, {})[route.method.lower()] = _operation(route, path, schemas)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Chorus", "version": installed_version()},
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def page(specification: Schema) -> str:
    """Returns the description as a page of HTML."""
    parts = []
    for path, operations in specification["paths"].items():
        for method, one in operations.items():
            shown = html.escape(msgspec.json.format(msgspec.json.encode(one)).decode())
            title = f"<code>{method.upper()} {html.escape(path)}</code> {html.escape(one['summary'])}"
            parts.append(f"<details><summary>{title}</summary><pre>{shown}</pre></details>")
    for name, schema in specification["components"]["schemas"].items():
        shown = html.escape(msgspec.json.format(msgspec.json.encode(schema)).decode())
        parts.append(
            f'<details id="{html.escape(name)}"><summary>{html.escape(name)}</summary><pre>{shown}</pre></details>'
        )
    head = f"<!doctype html><html lang=en><meta charset=utf-8><title>Chorus</title><style>{_STYLE}</style>"
    return f"{head}<h1>Chorus</h1><p>The same as <a href=openapi.json>openapi.json</a>.</p>{''.join(parts)}</html>"


def _operation(route: Route, path: str, schemas: Schema) -> Schema:
    handler: Any = route.handler
    while isinstance(handler, partial):
        handler = handler.func
    summary, _, rest = (inspect.getdoc(handler) or "").partition("\n\n")
    found: Schema = {
        "operationId": f"{route.method.lower()}_{handler.__name__}_{len(path)}",
        "summary": " ".join(summary.split()),
        "description": " ".join(f"{rest} Rights: {route.rights.value}.".split()),
        "responses": {"200": {"description": "The answer."}, "default": {"description": "OpenAI's error body."}},
        "parameters": [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name in re.findall(r"\{(\w+)\}", path)
        ],
    }
    if route.rights.value != "none":
        found["security"] = [{"key": []}]
    if route.body is not None:
        schema = {"$ref": _REFERENCE.format(name=route.body.__name__)}
        found["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": _with(route, schema, schemas)}},
        }
    return found


def _with(route: Route, schema: Schema, schemas: Schema) -> Schema:
    """Returns the body's schema with the sampling parameters under the names that the route takes."""
    if not route.spellings:
        return schema
    known = schemas[SamplingParams.__name__]["properties"]
    return {"allOf": [schema], "properties": {name: known[field] for name, field in route.spellings.items()}}
