"""The operator's routes: health, readiness, metrics, server information, and aborting requests by id."""

from __future__ import annotations

import importlib.metadata

import msgspec
from aiohttp import web

from engine.errors import InvalidRequest
from tokenizer_proc.http.bodies import decoding
from tokenizer_proc.http.encoding import as_json
from tokenizer_proc.http.service import Service


class AbortBody(msgspec.Struct, frozen=True, kw_only=True):
    """The requests to abort: one or more ids (a /generate rid, or the id of an OpenAI response), or all requests."""

    rid: str | list[str] | None = None
    abort_all: bool = False


async def health(service: Service, request: web.Request) -> web.StreamResponse:
    """Responds with 200 while the open requests make progress, and with 503 when they are stuck."""
    if not service.frontend.is_stuck:
        return as_json({"status": "ok"})
    answer = as_json({"status": "stuck"})
    answer.set_status(503)
    return answer


async def ready(service: Service, request: web.Request) -> web.StreamResponse:
    """Responds with 200 when requests can be served, else with 503."""
    if service.frontend.is_ready:
        return as_json({"status": "ready"})
    answer = as_json({"status": "starting"})
    answer.set_status(503)
    return answer


async def metrics(service: Service, request: web.Request) -> web.StreamResponse:
    """Returns the metrics in Prometheus' text format."""
    metrics = service.frontend.metrics
    return web.Response(body=metrics.render(), headers={"Content-Type": metrics.content_type})


async def server_info(service: Service, request: web.Request) -> web.StreamResponse:
    """Returns configuration, capacity and counts; `long_waiting` lists requests that wait over a second, and why."""
    facts, names = service.frontend.info(), service.open.names()
    for waiting in facts.get("long_waiting", ()):
        waiting["ids"] = names.get(waiting["request_id"], [])
    return as_json(facts)


async def version(service: Service, request: web.Request) -> web.StreamResponse:
    """Returns the installed version."""
    return as_json({"version": installed_version()})


async def abort_request(service: Service, request: web.Request) -> web.StreamResponse:
    """Aborts the requests of one or more ids in `rid`, or all with `abort_all`; ids that do not run are ignored."""
    body = decoding.decode(await decoding.read(request), AbortBody)
    if body.rid is None and not body.abort_all:
        raise InvalidRequest("send rid, or abort_all = true", param="rid")
    if body.abort_all:
        return as_json({"aborted": service.open.abort(None)})
    rids = [body.rid] if isinstance(body.rid, str) else body.rid or []
    return as_json({"aborted": service.open.abort(rids)})


def installed_version() -> str:
    """Returns the installed distribution's version, or "0" if the packages run without being installed."""
    try:
        return importlib.metadata.version("chorus-engine")
    except importlib.metadata.PackageNotFoundError:
        return "0"
