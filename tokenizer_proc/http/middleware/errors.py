"""Turns errors into responses with OpenAI's error body {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import errno
import logging
import math

import msgspec
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.typedefs import Handler

from engine.errors import EngineError, InternalError, InvalidRequest, NotFound, Overloaded, RateLimited

CAUSE = web.ResponseKey("cause", EngineError)
"""The key under which a response that is an error, or ends with one, stores the error for the access log."""


def body(error: EngineError) -> dict[str, object]:
    """Returns OpenAI's error body for `error`."""
    return {"error": {"message": error.message, "type": error.kind, "param": error.param, "code": error.code}}


def internal(error: BaseException) -> EngineError:
    """Returns the error to send to a client for an unexpected exception. Only the log shows the exception's details."""
    hidden = InternalError(f"internal error ({type(error).__name__}); the server's log has the details")
    hidden.__cause__ = error
    return hidden


def response(error: EngineError, *, status: int | None = None, headers: dict[str, str] | None = None) -> web.Response:
    """Returns the response for `error`. `status` overrides the HTTP status of the error's class."""
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
    """Filters aiohttp's server log: returns False for malformed requests, which are the client's fault."""
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, HttpProcessingError | web.RequestPayloadError)


@web.middleware
async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turns every exception of a handler into a response with an error body."""
    try:
        return await handler(request)
    except EngineError as error:
        return response(error)
    except web.HTTPException as error:
        return _from_aiohttp(request, error)
    except Exception as error:
        if request.transport is None or request.transport.is_closing():
            raise  # the client disconnected; aiohttp ends the request
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            return response(Overloaded("the server has as many files open as it may; try again"))
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
