"""All errors that a caller of the engine can get, as one class hierarchy.

    EngineError                 the root; the message says what to do
     +- ConfigError             a flag, a config file or a model that cannot be served
     +- InvalidRequest   400    the request is not valid; `param` names the field
     |   +- AdapterError 400    an adapter that cannot be served, by name and reason
     +- Unauthorized     401    a key is missing or wrong
     +- Forbidden        403    the key or the bind does not allow this call
     +- NotFound         404    no such model, adapter or request
     +- RateLimited      429    the key's rate is used up; try again after `retry_after` seconds
     +- Overloaded       503    a limit is reached; try again after `retry_after` seconds
     +- StorageFailed    503    the server's own disk or memory is full or faulty
     +- EngineDead       503    the engine is no longer running
     +- TimedOut         504    the request exceeded --request-timeout
     +- InternalError    500    a fault of the engine

The classes hold their HTTP status code and nothing else of HTTP; the HTTP and ZeroMQ servers build the responses.
"""

from __future__ import annotations

import errno
from typing import ClassVar


class EngineError(Exception):
    """The base class. `message` is for people, `code` for programs, `param` names the invalid field."""

    status: ClassVar[int] = 500
    kind: ClassVar[str] = "server_error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code


class ConfigError(EngineError):
    """The launch cannot continue; the message is one line that names the flag or file."""

    status = 400
    kind = "config_error"


class InvalidRequest(EngineError):
    """The request is not valid; `param` names the field."""

    status = 400
    kind = "invalid_request_error"


class AdapterError(InvalidRequest):
    """An adapter cannot be served; the message names the adapter, the part and the reason."""


class Unauthorized(EngineError):
    """A key is missing or wrong."""

    status = 401
    kind = "authentication_error"


class Forbidden(EngineError):
    """The key, or the address the server is bound to, does not allow this call."""

    status = 403
    kind = "permission_error"


class NotFound(EngineError):
    """There is no such model, adapter, route or request."""

    status = 404
    kind = "not_found_error"


class Overloaded(EngineError):
    """A limit of the engine is reached. The client may try again after `retry_after` seconds."""

    status = 503
    kind = "overloaded_error"

    def __init__(self, message: str, *, retry_after: float = 1.0) -> None:
        super().__init__(message, code="overloaded")
        self.retry_after = retry_after


class RateLimited(EngineError):
    """The API key's rate is used up. The client may try again after `retry_after` seconds."""

    status = 429
    kind = "rate_limit_error"

    def __init__(self, message: str, *, retry_after: float = 1.0) -> None:
        super().__init__(message, code="rate_limit_exceeded")
        self.retry_after = retry_after


class StorageFailed(EngineError):
    """The server's own disk or memory is full or faulty. The message says where; the call may be sent again later."""

    status = 503
    kind = "storage_error"


class EngineDead(EngineError):
    """The engine is no longer running."""

    status = 503
    kind = "service_unavailable"


class TimedOut(EngineError):
    """The request exceeded --request-timeout."""

    status = 504
    kind = "timeout_error"


class InternalError(EngineError):
    """An error inside the engine, which the request did not cause."""

    status = 500
    kind = "server_error"


_BY_KIND: dict[str, type[EngineError]] = {
    cls.kind: cls
    for cls in (
        ConfigError,
        InvalidRequest,
        Unauthorized,
        Forbidden,
        NotFound,
        StorageFailed,
        EngineDead,
        TimedOut,
        InternalError,
    )
}


_SERVER_FAULTS = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ESTALE}
)


def is_server_fault(error: BaseException) -> bool:
    """Returns whether this is an OSError that no caller caused: a full or broken disk, no memory, no descriptors."""
    return isinstance(error, OSError) and error.errno in _SERVER_FAULTS


def error_from_wire(kind: str, message: str, param: str | None, code: str | None) -> EngineError:
    """Returns the exception for an error that was sent between processes as (kind, message, param, code)."""
    if kind == Overloaded.kind:
        return Overloaded(message)
    return _BY_KIND.get(kind, InternalError)(message, param=param, code=code)
