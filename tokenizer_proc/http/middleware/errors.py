"""Every failure as the OpenAI error body {"error": {"message", "type", "param", "code"}}. Knows no route."""

from __future__ import annotations

import logging
import math

import msgspec
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.typedefs import Handler

from engine.errors import EngineError, InternalError, InvalidRequest, NotFound, Overloaded, RateLimited

CAUSE = web.ResponseKey("cause", EngineError)
"""Where an answer that is, or ends with, an error carries that error, for the log."""


def body(error: EngineError) -> dict[str, object]:
    """What a client reads."""
    return {"error": {"message": error.message, "type": error.kind, "param": error.param, "code": error.code}}


def internal(error: BaseException) -> EngineError:
    """An unexpected exception: its traceback is for the log, the client learns that it is our fault."""
    ours = InternalError(f"internal error ({type(error).__name__}); the server's log has the details")
    ours.__cause__ = error
    return ours


def response(error: EngineError, *, status: int | None = None, headers: dict[str, str] | None = None) -> web.Response:
    """The whole answer for `error`; `status` overrides the class's own."""
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


def is_ours(record: logging.LogRecord) -> bool:
    """Whether a line of aiohttp's server log is for us: what is no HTTP is its sender's fault, and was answered so."""
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, HttpProcessingError | web.RequestPayloadError)


@web.middleware
async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turns whatever a handler raises into an answer of the one shape."""
    try:
        return await handler(request)
    except EngineError as error:
        return response(error)
    except web.HTTPException as error:
        return _from_aiohttp(request, error)
    except Exception as error:
        if request.transport is None or request.transport.is_closing():
            raise  # nobody is there to be answered; aiohttp ends it
        return response(internal(error))


def _from_aiohttp(request: web.Request, error: web.HTTPException) -> web.StreamResponse:
    if error.status == 404:
        return response(NotFound(f"there is no {request.path}", code="unknown_url"))
    if isinstance(error, web.HTTPMethodNotAllowed):
        allowed = ", ".join(sorted(error.allowed_methods))
        complaint = InvalidRequest(f"{request.path} takes {allowed}, not {request.method}", code="method_not_allowed")
        return response(complaint, status=405, headers={"Allow": allowed})
    if error.status == 413:
        complaint = InvalidRequest(f"the body is too large: {error.text}", code="request_too_large")
        return response(complaint, status=413)
    if error.status >= 400:
        return response(InvalidRequest(error.reason), status=error.status)
    raise error
