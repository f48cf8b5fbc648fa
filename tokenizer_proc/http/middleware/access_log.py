"""The access log: one line for every call, however the call ended, with the request id that its response has.

    call id=5f2c method=POST path=/generate status=200 lora=sql prompt=12 tokens=40 finish=stop seconds=0.512
    call id=mine method=POST path=/generate status=400 kind=invalid_request_error param=text message="..." seconds=0.001
    call id=5f2d method=POST path=/generate status=200 end=gone prompt=12 tokens=7 seconds=0.100

Of a client's request, a line shows the id, the method and the path, but never a body or a key.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid

from aiohttp import web
from aiohttp.abc import AbstractAccessLogger
from aiohttp.typedefs import Handler

from engine import logs
from engine.errors import EngineError, InternalError
from tokenizer_proc.http.middleware import errors
from tokenizer_proc.telemetry.error_log import error_fields

log = logging.getLogger(__name__)

REQUEST_ID = "X-Request-Id"
LONGEST_ID = 256


class AccessRecord:
    """The access log line of one call. Routes add `facts`.

    `cause` is the error that ended the call, if the response does not carry that error. `arrived` is the time at which
    the request's head had been read (monotonic seconds).
    """

    def __init__(self, request: web.Request) -> None:
        self.id = _id(request.headers.get(REQUEST_ID, ""))
        self.facts: dict[str, object] = {}
        self.cause: EngineError | None = None
        self._request = request
        self.arrived = time.monotonic()

    def close(self, answer: web.StreamResponse | None) -> None:
        """Writes the line. `answer` is the response, or None if the client disconnected before there was one."""
        error = self.cause or (None if answer is None else answer.get(errors.CAUSE))
        status = None if answer is None else answer.status
        fault = error.__cause__ if isinstance(error, InternalError) else None
        level = logging.WARNING if self.cause else _level(self._request.method, status, error)
        if not log.isEnabledFor(level):
            return
        if answer is None and error is None:
            self.facts["end"] = "gone"
        line = logs.pairs(
            id=self.id,
            method=self._request.method,
            path=self._request.rel_url.raw_path,
            status=status,
            **({} if error is None else error_fields(error)),
            **self.facts,
            seconds=time.monotonic() - self.arrived,
        )
        log.log(level, "call %s", line, exc_info=fault)


ACCESS_RECORD = web.RequestKey("record", AccessRecord)
"""The key under which a request stores its AccessRecord."""


@web.middleware
async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    """The outermost middleware, which writes the access log line when a call ends."""
    record = request[ACCESS_RECORD] = AccessRecord(request)
    answer = None
    try:
        answer = await handler(request)
        return answer
    except asyncio.CancelledError:
        raise  # the client disconnected, or the server shuts down
    except web.HTTPException as error:
        answer = error
        raise
    finally:
        record.close(answer)


async def add_request_id(request: web.Request, answer: web.StreamResponse) -> None:
    """Sets the response's X-Request-Id header: the id that the client sent if it is valid, else a new one."""
    record = request.get(ACCESS_RECORD)
    answer.headers[REQUEST_ID] = record.id if record is not None else uuid.uuid4().hex


class MalformedRequestLogger(AbstractAccessLogger):
    """Writes the line of a malformed request, to which aiohttp responds before any middleware runs."""

    @property
    def enabled(self) -> bool:
        """Whether the log level lets the line be written."""
        return log.isEnabledFor(logging.INFO)

    def log(self, request: web.BaseRequest, response: web.StreamResponse, time: float) -> None:
        """Writes the line. aiohttp calls this for every response; calls that reached the middleware are skipped."""
        if ACCESS_RECORD not in request:
            given = response.headers.get(REQUEST_ID)
            line = logs.pairs(id=given, status=response.status, kind="bad_http", seconds=time)
            log.info("call %s", line)


def _id(given: str) -> str:
    is_sound = given.isascii() and given.isprintable() and 0 < len(given) <= LONGEST_ID
    return given if is_sound else uuid.uuid4().hex


def _level(method: str, status: int | None, error: Exception | None) -> int:
    if isinstance(error, InternalError):
        return logging.ERROR
    is_lookup = method in ("GET", "HEAD") and status is not None and status < 400
    return logging.DEBUG if is_lookup else logging.INFO
