"""The operator's routes: health, load, metrics, server information, aborting requests by id, the prefix cache."""

from __future__ import annotations

import asyncio
import importlib.metadata
from datetime import UTC, datetime

import msgspec
from aiohttp import web

from engine.errors import EngineError, InvalidRequest
from engine.messages import SamplingParams, Submit
from tokenizer_proc.http.auth.api_keys import Role
from tokenizer_proc.http.auth.rights import check_operator, is_operator, tenant_of
from tokenizer_proc.http.bodies import decoding
from tokenizer_proc.http.encoding import as_json
from tokenizer_proc.http.service import Service
from tokenizer_proc.requests.deadline import Deadline

PROBE_SECONDS = 20.0
"""How long the token of /health_generate may take."""


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


async def ping(service: Service, request: web.Request) -> web.StreamResponse:
    """Does the same as `/health`, for SageMaker."""
    return await health(service, request)


async def health_generate(service: Service, request: web.Request) -> web.StreamResponse:
    """Responds with 200 if a token can be generated, else with 503. While requests are open, their progress counts.

    At most one token is generated at one time, however many calls wait for it.
    """
    if not service.frontend.is_ready:
        return _failing("the model is still loading, or the server is shutting down")
    if service.frontend.open_requests and service.probe is None:
        return await health(service, request)
    if service.probe is None:
        service.probe = asyncio.create_task(_generated(service))
    reason = await asyncio.shield(service.probe)
    return as_json({"status": "ok"}) if reason is None else _failing(reason)


async def _generated(service: Service) -> str | None:
    """Generates one token. Returns None, or why that failed."""
    submit = Submit(id=0, prompt=[0], params=SamplingParams(max_tokens=1, temperature=0.0))
    try:
        async with service.frontend.open(submit, Deadline(PROBE_SECONDS)) as stream:
            async for _ in stream:
                pass
    except EngineError as error:
        return error.message
    finally:
        service.probe = None
    return None


def _failing(reason: str) -> web.Response:
    answer = as_json({"status": "failing", "reason": reason})
    answer.set_status(503)
    return answer


async def load(service: Service, request: web.Request) -> web.StreamResponse:
    """Returns the number of open requests as vLLM does: `{"server_load"}`."""
    return as_json({"server_load": service.frontend.open_requests})


async def loads(service: Service, request: web.Request) -> web.StreamResponse:
    """Returns running and waiting requests and the use of KV pages and rank pages in SGLang's shape."""
    now = datetime.now(UTC).isoformat()
    return as_json({"timestamp": now, "version": installed_version(), "loads": [service.frontend.current_load()]})


async def flush_cache(service: Service, request: web.Request) -> web.StreamResponse:
    """Makes no later request find the prefixes cached so far. Requests that run go on; memory is reused as needed."""
    service.frontend.flush_prefixes()
    return web.Response(text="Cache flushed.\n")


async def reset_prefix_cache(service: Service, request: web.Request) -> web.StreamResponse:
    """Does the same as `/flush_cache`, under vLLM's name and with an empty answer."""
    service.frontend.flush_prefixes()
    return web.Response()


async def ready(service: Service, request: web.Request) -> web.StreamResponse:
    """Responds with 200 when requests can be served, else with 503."""
    if service.frontend.is_ready:
        return as_json({"status": "ready"})
    answer = as_json({"status": "starting"})
    answer.set_status(503)
    return answer


async def metrics(service: Service, request: web.Request) -> web.StreamResponse:
    """Returns the metrics in Prometheus' text format; see `--metrics-rights` for who sees which."""
    metrics, rights = service.frontend.metrics, service.config.metrics_rights
    if rights == "operator":
        check_operator(request)
    body = metrics.render(with_adapters=rights == "open" or is_operator(request))
    return web.Response(body=body, headers={"Content-Type": metrics.content_type})


async def server_info(service: Service, request: web.Request) -> web.StreamResponse:
    """Returns configuration, capacity and counts; `long_waiting` lists requests that wait over a second, and why.

    With `?config_format=json` the answer has vLLM's shape, `{"vllm_config": {"model_config", "lora_config", ...}}`.
    """
    form = request.query.get("config_format")
    if form == "json":
        return as_json(service.frontend.vllm_info())
    if form is not None:
        raise InvalidRequest("config_format is json, or left out", param="config_format")
    facts, names = service.frontend.info(), service.open.names()
    for waiting in facts.get("long_waiting", ()):
        waiting["ids"] = names.get(waiting["request_id"], [])
    return as_json(facts)


async def version(service: Service, request: web.Request) -> web.StreamResponse:
    """Returns the installed version."""
    return as_json({"version": installed_version()})


async def abort_request(service: Service, request: web.Request) -> web.StreamResponse:
    """Aborts the caller's requests of one or more ids in `rid`, or all with `abort_all`; an operator aborts anybody's.

    Ids that do not run are ignored, and so are those of other callers.
    """
    body = decoding.decode(await decoding.read(request), AbortBody)
    if body.rid is None and not body.abort_all:
        raise InvalidRequest("send rid, or abort_all = true", param="rid")
    tenant = tenant_of(request)
    owner = None if tenant.role >= Role.OPERATOR else tenant.owner
    rids = [body.rid] if isinstance(body.rid, str) else body.rid or []
    return as_json({"aborted": service.open.abort(owner, None if body.abort_all else rids)})


def installed_version() -> str:
    """Returns the installed distribution's version, or "0" if the packages run without being installed."""
    try:
        return importlib.metadata.version("chorus-engine")
    except importlib.metadata.PackageNotFoundError:
        return "0"
