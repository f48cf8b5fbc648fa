"""The aiohttp application: every route with the rights it needs, and the middlewares around them."""

from __future__ import annotations

from functools import partial

from aiohttp import web
from aiohttp.typedefs import Handler

from engine.config.process_configs import TokenizerConfig
from tokenizer_proc.frontend import Frontend
from tokenizer_proc.http.auth import hosts, rights
from tokenizer_proc.http.auth.rights import RIGHTS, TENANT, Rights
from tokenizer_proc.http.bodies.fields import SPELLINGS_OPENAI
from tokenizer_proc.http.intake.body_reader import ACCOUNT, INTAKE, Intake
from tokenizer_proc.http.intake.connection import drop_unread_body
from tokenizer_proc.http.intake.memory_budget import MemoryBudget
from tokenizer_proc.http.middleware import access_log, backpressure, cors, errors, expectations, memory
from tokenizer_proc.http.routes import chat, completions, generate, lora, models, openapi, operations, tokenize
from tokenizer_proc.http.routes.route import Route
from tokenizer_proc.http.service import Service

ROUTES = [
    Route("POST", "/v1/chat/completions", Rights.INFERENCE, chat.chat_completions, chat.ChatBody, SPELLINGS_OPENAI),
    Route("POST", "/v1/chat/completions/render", Rights.INFERENCE, chat.render, chat.ChatBody, SPELLINGS_OPENAI),
    Route(
        "POST",
        "/v1/completions",
        Rights.INFERENCE,
        completions.completions,
        completions.CompletionBody,
        SPELLINGS_OPENAI,
    ),
    Route("GET", "/v1/models", Rights.INFERENCE, models.list_models),
    Route("GET", "/v1/models/{id:.+}", Rights.INFERENCE, models.retrieve_model),
    Route("POST", "/generate", Rights.INFERENCE, generate.generate, generate.GenerateBody),
    Route("POST", "/tokenize", Rights.INFERENCE, tokenize.tokenize, tokenize.TokenizeBody),
    Route("POST", "/detokenize", Rights.INFERENCE, tokenize.detokenize, tokenize.DetokenizeBody),
    Route("POST", "/load_lora_adapter", Rights.ADMIN, lora.load, lora.LoadBody),
    Route("POST", "/unload_lora_adapter", Rights.ADMIN, lora.unload, lora.NameBody),
    Route("POST", "/pin_lora_adapter", Rights.ADMIN, lora.pin, lora.NameBody),
    Route("POST", "/unpin_lora_adapter", Rights.ADMIN, lora.unpin, lora.NameBody),
    Route("POST", "/load_lora_adapter_from_tensors", Rights.ADMIN, lora.load_from_tensors),
    Route("POST", "/v1/load_lora_adapter", Rights.ADMIN, lora.v1_load, lora.V1LoadBody),
    Route("POST", "/v1/unload_lora_adapter", Rights.ADMIN, lora.v1_unload, lora.V1UnloadBody),
    Route("GET", "/health", Rights.NONE, operations.health),
    Route("GET", "/ready", Rights.NONE, operations.ready),
    Route("GET", "/metrics", Rights.NONE, operations.metrics),
    Route("GET", "/server_info", Rights.OPERATOR, operations.server_info),
    Route("GET", "/get_server_info", Rights.OPERATOR, operations.server_info),
    Route("GET", "/version", Rights.INFERENCE, operations.version),
    Route("POST", "/abort_request", Rights.OWN, operations.abort_request, operations.AbortBody),
    Route("GET", "/health_generate", Rights.NONE, operations.health_generate),
    Route("GET", "/ping", Rights.NONE, operations.ping),
    Route("POST", "/ping", Rights.NONE, operations.ping),
    Route("GET", "/load", Rights.INFERENCE, operations.load),
    Route("GET", "/v1/loads", Rights.INFERENCE, operations.loads),
    Route("GET", "/flush_cache", Rights.OPERATOR, operations.flush_cache),
    Route("POST", "/flush_cache", Rights.OPERATOR, operations.flush_cache),
    Route("POST", "/reset_prefix_cache", Rights.OPERATOR, operations.reset_prefix_cache),
    Route("GET", "/model_info", Rights.INFERENCE, models.model_info),
    Route("GET", "/get_model_info", Rights.INFERENCE, models.model_info),
    Route("GET", "/tokenizer_info", Rights.INFERENCE, models.tokenizer_info),
    Route("GET", "/openapi.json", Rights.NONE, openapi.openapi),
    Route("GET", "/docs", Rights.NONE, openapi.docs),
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
        hosts.middleware(config),
        *([cors.middleware(config.cors)] if config.cors.origins else []),
        rights.middleware(config),
        expectations.middleware,
        _count_for_tenant,
    ]
    app = web.Application(middlewares=middlewares)
    app[INTAKE] = Intake(MemoryBudget(config.max_request_memory), config.max_body_bytes, config.read_timeout)
    app[openapi.SPECIFICATION] = openapi.specification(ROUTES)
    declared = app[RIGHTS] = {}
    for route in ROUTES:
        for method in ("GET", "HEAD") if route.method == "GET" else (route.method,):  # load balancers probe by HEAD
            handler = partial(route.handler, service)
            added = app.router.add_route(method, route.path, handler, expect_handler=expectations.later)
            declared[added] = route.rights
    app.on_response_prepare.extend((access_log.add_request_id, rights.add_rates, drop_unread_body))
    if config.cors.origins:
        app.on_response_prepare.append(partial(cors.add_headers, config.cors))
    return app


@web.middleware
async def _count_for_tenant(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Counts the memory of a call for its tenant instead of its address, if its key names a tenant."""
    if (tenant := request.get(TENANT)) is not None and tenant.name:
        request[ACCOUNT].move(f"tenant {tenant.name}")
    return await handler(request)
