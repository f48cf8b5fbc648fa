"""Errors as OpenAI's error body {"error": {"message", "type", "param", "code"}}. Knows no route."""

from __future__ import annotations

import logging
import math

import msgspec
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.typedefs import Handler

from engine.errors import EngineError, InternalError, InvalidRequest, NotFound, Overloaded, RateLimited

CAUSE = web.ResponseKey("cause", EngineError)
"""Where an answer that is an error, or ends with one, carries it for the access log."""


def body(error: EngineError) -> dict[str, object]:
    """The error body."""
    return {"error": {"message": error.message, "type": error.kind, "param": error.param, "code": error.code}}


def internal(error: BaseException) -> EngineError:
    """The error that a client gets for an unexpected exception, whose traceback goes to the log alone."""
    hidden = InternalError(f"internal error ({type(error).__name__}); the server's log has the details")
    hidden.__cause__ = error
    return hidden


def response(error: EngineError, *, status: int | None = None, headers: dict[str, str] | None = None) -> web.Response:
    """The answer for `error`; `status` overrides that of its class."""
    headers = dict(headers or {})
    if isinstance(error, Overloaded | RateLimited):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    answer = web.Response(
        body=msgspec.json.encode(body(error)),
        status=status or error.status,
        headers=headers,
        content_type="application/json",
    )
    answer[CAUSE] = error
    return answer


def is_server_fault(record: logging.LogRecord) -> bool:
    """A filter of aiohttp's server log: malformed requests are the client's fault, and were answered as such."""
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, HttpProcessingError | web.RequestPayloadError)


@web.middleware
async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turns every exception of a handler into an answer with an error body."""
    try:
        return await handler(request)
    except EngineError as error:
        return response(error)
    except web.HTTPException as error:
        return _from_aiohttp(request, error)
    except Exception as error:
        if request.transport is None or request.transport.is_closing():
            raise  # the client disconnected; aiohttp ends the request
        return response(internal(error))


def _from_aiohttp(request: web.Request, error: web.HTTPException) -> web.StreamResponse:
    if error.status == 404:
        return response(NotFound(f"there is no {request.path}", code="unknown_url"))
    if isinstance(error, web.HTTPMethodNotAllowed):
        allowed = ", ".join(sorted(error.allowed_methods))
        refusal = InvalidRequest(f"{request.path} takes {allowed}, not {request.method}", code="method_not_allowed")
        return response(refusal, status=405, headers={"Allow": allowed})
    if error.status == 413:
        refusal = InvalidRequest(f"the body is too large: {error.text}", code="request_too_large")
        return response(refusal, status=413)
    if error.status >= 400:
        return response(InvalidRequest(error.reason), status=error.status)
    raise error
