"""The aiohttp application: every route, the error shape around them, a request id on every answer."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial

from aiohttp import web

from engine.config.sections import TokenizerConfig
from tokenizer_proc.frontend import Frontend
from tokenizer_proc.http.auth import access
from tokenizer_proc.http.generation import Service
from tokenizer_proc.http.middleware import access_log, backpressure, errors
from tokenizer_proc.http.routes import generate, lora, models, operations, tokenize
from tokenizer_proc.http.routes.chat import chat_completions
from tokenizer_proc.http.routes.completions import completions

Route = Callable[[Service, web.Request], Awaitable[web.StreamResponse]]

ROUTES: list[tuple[str, str, Route]] = [
    ("POST", "/v1/chat/completions", chat_completions),
    ("POST", "/v1/completions", completions),
    ("GET", "/v1/models", models.list_models),
    ("GET", "/v1/models/{id:.+}", models.retrieve_model),
    ("POST", "/generate", generate.generate),
    ("POST", "/tokenize", tokenize.tokenize),
    ("POST", "/detokenize", tokenize.detokenize),
    ("POST", "/load_lora_adapter", lora.load),
    ("POST", "/unload_lora_adapter", lora.unload),
    ("POST", "/pin_lora_adapter", lora.pin),
    ("POST", "/unpin_lora_adapter", lora.unpin),
    ("POST", "/load_lora_adapter_from_tensors", lora.load_from_tensors),
    ("POST", "/v1/load_lora_adapter", lora.v1_load),
    ("POST", "/v1/unload_lora_adapter", lora.v1_unload),
    ("GET", "/health", operations.health),
    ("GET", "/ready", operations.ready),
    ("GET", "/metrics", operations.metrics),
    ("GET", "/server_info", operations.server_info),
    ("GET", "/get_server_info", operations.server_info),
    ("GET", "/version", operations.version),
    ("POST", "/abort_request", operations.abort_request),
]


def create_app(frontend: Frontend, config: TokenizerConfig) -> web.Application:
    """The door on `frontend`. Serve it with handler cancellation on: a client that is gone ends its handler."""
    service = Service(frontend, config)
    bounded = backpressure.bounded(config.max_stream_buffer, config.stream_stall_timeout)
    middlewares = [access_log.middleware, bounded, errors.middleware, access.gate(config)]
    app = web.Application(middlewares=middlewares, client_max_size=config.max_body_bytes)
    for method, path, route in ROUTES:
        app.router.add_route(method, path, partial(route, service))
        if method == "GET":
            app.router.add_route("HEAD", path, partial(route, service))  # load balancers ask this way
    app.on_response_prepare.append(access_log.name)
    return app
