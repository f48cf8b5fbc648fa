"""Cross-origin calls of web pages: which pages of other origins a browser lets call the server. None by default.

    preflight   OPTIONS with Origin and Access-Control-Request-Method    answered here, without a key
    call        with Origin                                              its answer names the origin, also an error's

An origin that is not allowed gets no such header, so the browser keeps the answer from the page. Keys are checked all
the same: what a page may read is decided by the browser, what a call may do by its key.
"""

from __future__ import annotations

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from engine.config.cors import Cors
from tokenizer_proc.http.middleware.access_log import REQUEST_ID

MAX_AGE_SECONDS = 600
METHODS = "GET, HEAD, POST"


def middleware(cors: Cors) -> Middleware:
    """Returns the middleware that answers preflights of allowed origins."""

    @web.middleware
    async def answer_preflights(request: web.Request, handler: Handler) -> web.StreamResponse:
        asked = request.headers.get("Access-Control-Request-Method")
        if request.method != "OPTIONS" or asked is None or _allowed(cors, request) is None:
            return await handler(request)
        headers = request.headers.get("Access-Control-Request-Headers", "")
        return web.Response(
            status=204,
            headers={
                "Access-Control-Allow-Methods": ", ".join(cors.methods) or METHODS,
                "Access-Control-Allow-Headers": ", ".join(cors.headers) or headers,
                "Access-Control-Max-Age": str(MAX_AGE_SECONDS),
            },
        )

    return answer_preflights


async def add_headers(cors: Cors, request: web.Request, response: web.StreamResponse) -> None:
    """Adds the headers that tell a browser that the page may read the answer."""
    response.headers.add("Vary", "Origin")
    origin = _allowed(cors, request)
    if origin is None:
        return
    response.headers["Access-Control-Allow-Origin"] = origin
    response.headers["Access-Control-Expose-Headers"] = REQUEST_ID
    if cors.credentials:
        response.headers["Access-Control-Allow-Credentials"] = "true"


def _allowed(cors: Cors, request: web.Request) -> str | None:
    """Returns what the answer says about the origin of the call, or None if that origin is not allowed."""
    origin = request.headers.get("Origin")
    if origin is None or not ("*" in cors.origins or origin in cors.origins):
        return None
    return "*" if "*" in cors.origins and not cors.credentials else origin
