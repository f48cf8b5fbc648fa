"""The aiohttp application: every route with the rights it needs, and the middlewares around them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import NamedTuple

from aiohttp import web
from aiohttp.typedefs import Handler

from engine.config.process_configs import TokenizerConfig
from tokenizer_proc.frontend import Frontend
from tokenizer_proc.http.auth import rights
from tokenizer_proc.http.auth.rights import RIGHTS, TENANT, Rights
from tokenizer_proc.http.intake.body_reader import ACCOUNT, INTAKE, Intake
from tokenizer_proc.http.intake.connection import drop_unread_body
from tokenizer_proc.http.intake.memory_budget import MemoryBudget
from tokenizer_proc.http.middleware import access_log, backpressure, errors, memory
from tokenizer_proc.http.routes import generate, lora, models, operations, tokenize
from tokenizer_proc.http.routes.chat import chat_completions
from tokenizer_proc.http.routes.completions import completions
from tokenizer_proc.http.service import Service


class Route(NamedTuple):
    """A route: its method and path, the rights that it needs, and its handler."""

    method: str
    path: str
    rights: Rights
    handler: Callable[[Service, web.Request], Awaitable[web.StreamResponse]]


ROUTES = [
    Route("POST", "/v1/chat/completions", Rights.INFERENCE, chat_completions),
    Route("POST", "/v1/completions", Rights.INFERENCE, completions),
    Route("GET", "/v1/models", Rights.INFERENCE, models.list_models),
    Route("GET", "/v1/models/{id:.+}", Rights.INFERENCE, models.retrieve_model),
    Route("POST", "/generate", Rights.INFERENCE, generate.generate),
    Route("POST", "/tokenize", Rights.INFERENCE, tokenize.tokenize),
    Route("POST", "/detokenize", Rights.INFERENCE, tokenize.detokenize),
    Route("POST", "/load_lora_adapter", Rights.ADMIN, lora.load),
    Route("POST", "/unload_lora_adapter", Rights.ADMIN, lora.unload),
    Route("POST", "/pin_lora_adapter", Rights.ADMIN, lora.pin),
    Route("POST", "/unpin_lora_adapter", Rights.ADMIN, lora.unpin),
    Route("POST", "/load_lora_adapter_from_tensors", Rights.ADMIN, lora.load_from_tensors),
    Route("POST", "/v1/load_lora_adapter", Rights.ADMIN, lora.v1_load),
    Route("POST", "/v1/unload_lora_adapter", Rights.ADMIN, lora.v1_unload),
    Route("GET", "/health", Rights.NONE, operations.health),
    Route("GET", "/ready", Rights.NONE, operations.ready),
    Route("GET", "/metrics", Rights.NONE, operations.metrics),
    Route("GET", "/server_info", Rights.OPERATOR, operations.server_info),
    Route("GET", "/get_server_info", Rights.OPERATOR, operations.server_info),
    Route("GET", "/version", Rights.INFERENCE, operations.version),
    Route("POST", "/abort_request", Rights.OPERATOR, operations.abort_request),
]


def create_app(frontend: Frontend, config: TokenizerConfig) -> web.Application:
    """Returns the HTTP application of `frontend`.

    It must be served with aiohttp's handler cancellation, so that a client's disconnect ends the handler.
    """
    service = Service(frontend, config)
    middlewares = [
        access_log.middleware,
        memory.middleware,
        backpressure.middleware(config.max_stream_buffer, config.stream_stall_timeout),
        errors.middleware,
        rights.middleware(config),
        _count_for_tenant,
    ]
    app = web.Application(middlewares=middlewares)
    app[INTAKE] = Intake(MemoryBudget(config.max_request_memory), config.max_body_bytes, config.read_timeout)
    declared = app[RIGHTS] = {}
    for route in ROUTES:
        for method in ("GET", "HEAD") if route.method == "GET" else (route.method,):  # load balancers probe by HEAD
            added = app.router.add_route(method, route.path, partial(route.handler, service))
            declared[added] = route.rights
    app.on_response_prepare.extend((access_log.add_request_id, drop_unread_body))
    return app


@web.middleware
async def _count_for_tenant(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Counts the memory of a call for its tenant instead of its address, if its key names a tenant."""
    if (tenant := request.get(TENANT)) is not None and tenant.name:
        request[ACCOUNT].move(f"tenant {tenant.name}")
    return await handler(request)
