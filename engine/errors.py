"""Every error a caller can meet, in one tree.

    EngineError                 what a user can cause or meet; its text says what to do
     +- ConfigError             a flag, a config file or a model that cannot be served
     +- InvalidRequest   400    a request that makes no sense; `param` names the field
     |   +- AdapterError 400    an adapter that cannot be served, by name and reason
     +- Unauthorized     401    a key is missing or wrong
     +- Forbidden        403    allowed to others, or only after the operator opened it
     +- NotFound         404    no such model, adapter or request
     +- RateLimited      429    this caller has used up its rate; try again after `retry_after` seconds
     +- Overloaded       503    a bound is reached; try again after `retry_after` seconds
     +- EngineDead       503    the engine behind this client is gone
     +- TimedOut         504    the request took longer than the operator allows
     +- InternalError    500    our fault

The classes know nothing of HTTP but their status number; the doors turn them into bodies.
"""

from __future__ import annotations

from typing import ClassVar


class EngineError(Exception):
    """The root: `message` is for people, `code` for programs, `param` names the field at fault."""

    status: ClassVar[int] = 500
    kind: ClassVar[str] = "server_error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code


class ConfigError(EngineError):
    """A launch that cannot go on: one line that names the flag or file."""

    status = 400
    kind = "config_error"


class InvalidRequest(EngineError):
    """The client's fault."""

    status = 400
    kind = "invalid_request_error"


class AdapterError(InvalidRequest):
    """An adapter that cannot be served; the message names the adapter, the part and the reason."""


class Unauthorized(EngineError):
    """A key is missing or wrong."""

    status = 401
    kind = "authentication_error"


class Forbidden(EngineError):
    """Not for this caller, or not opened by the operator."""

    status = 403
    kind = "permission_error"


class NotFound(EngineError):
    """No such model, adapter, route or request."""

    status = 404
    kind = "not_found_error"


class Overloaded(EngineError):
    """A bound is reached. `retry_after` is in seconds."""

    status = 503
    kind = "overloaded_error"

    def __init__(self, message: str, *, retry_after: float = 1.0) -> None:
        super().__init__(message, code="overloaded")
        self.retry_after = retry_after


class RateLimited(EngineError):
    """This caller's rate is used up. `retry_after` is in seconds."""

    status = 429
    kind = "rate_limit_error"

    def __init__(self, message: str, *, retry_after: float = 1.0) -> None:
        super().__init__(message, code="rate_limit_exceeded")
        self.retry_after = retry_after


class EngineDead(EngineError):
    """The engine behind this client is gone."""

    status = 503
    kind = "service_unavailable"


class TimedOut(EngineError):
    """The request took longer than the operator allows."""

    status = 504
    kind = "timeout_error"


class InternalError(EngineError):
    """Our fault."""

    status = 500
    kind = "server_error"


_BY_KIND: dict[str, type[EngineError]] = {
    cls.kind: cls
    for cls in (ConfigError, InvalidRequest, Unauthorized, Forbidden, NotFound, EngineDead, TimedOut, InternalError)
}


def error_from_wire(kind: str, message: str, param: str | None, code: str | None) -> EngineError:
    """The error that crossed a socket as (kind, message, param, code), as an exception again."""
    if kind == Overloaded.kind:
        return Overloaded(message)
    return _BY_KIND.get(kind, InternalError)(message, param=param, code=code)
