"""The aiohttp application: every route, the error shape around them, a request id on every answer."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial

from aiohttp import web

from engine.config import TokenizerConfig
from tokenizer_proc.api import access, errors, lora, models, native, ops, outlet, record, tokens
from tokenizer_proc.api.chat import chat_completions
from tokenizer_proc.api.completions import completions
from tokenizer_proc.api.service import Service
from tokenizer_proc.frontend import Frontend

Route = Callable[[Service, web.Request], Awaitable[web.StreamResponse]]

ROUTES: list[tuple[str, str, Route]] = [
    ("POST", "/v1/chat/completions", chat_completions),
    ("POST", "/v1/completions", completions),
    ("GET", "/v1/models", models.list_models),
    ("GET", "/v1/models/{id:.+}", models.retrieve_model),
    ("POST", "/generate", native.generate),
    ("POST", "/tokenize", tokens.tokenize),
    ("POST", "/detokenize", tokens.detokenize),
    ("POST", "/load_lora_adapter", lora.load),
    ("POST", "/unload_lora_adapter", lora.unload),
    ("POST", "/pin_lora_adapter", lora.pin),
    ("POST", "/unpin_lora_adapter", lora.unpin),
    ("POST", "/load_lora_adapter_from_tensors", lora.load_from_tensors),
    ("POST", "/v1/load_lora_adapter", lora.v1_load),
    ("POST", "/v1/unload_lora_adapter", lora.v1_unload),
    ("GET", "/health", ops.health),
    ("GET", "/ready", ops.ready),
    ("GET", "/metrics", ops.metrics),
    ("GET", "/server_info", ops.server_info),
    ("GET", "/get_server_info", ops.server_info),
    ("GET", "/version", ops.version),
    ("POST", "/abort_request", ops.abort_request),
]


def create_app(frontend: Frontend, config: TokenizerConfig) -> web.Application:
    """The door on `frontend`. Serve it with handler cancellation on: a client that is gone ends its handler."""
    service = Service(frontend, config)
    bounded = outlet.bounded(config.max_stream_buffer, config.stream_stall_timeout)
    middlewares = [record.middleware, bounded, errors.middleware, access.gate(config)]
    app = web.Application(middlewares=middlewares, client_max_size=config.max_body_bytes)
    for method, path, route in ROUTES:
        app.router.add_route(method, path, partial(route, service))
        if method == "GET":
            app.router.add_route("HEAD", path, partial(route, service))  # load balancers ask this way
    app.on_response_prepare.append(record.name)
    return app
