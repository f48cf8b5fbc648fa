"""Which HTTP calls may change adapters.

    with an admin key   calls that carry it                                          else 401
    without one         on a loopback bind, or where the operator opened it          else 403
    on a loopback bind  the Host header names this machine, so that a web page       else 403
                        whose own name resolves to it cannot call (DNS rebinding)

Knows nothing of what a call does.
"""

from __future__ import annotations

import ipaddress
import secrets
from urllib.parse import urlsplit

from aiohttp import web

from engine.config.process_configs import TokenizerConfig
from engine.errors import Forbidden, Unauthorized

DEFAULT_HOST = "127.0.0.1"


def admit(config: TokenizerConfig, request: web.Request) -> None:
    """Raises Unauthorized or Forbidden unless this call may change adapters."""
    _check_host(config, request)
    if config.admin_key is not None:
        _check_key(config.admin_key, request.headers.get("Authorization", ""))
    elif not config.runtime_loads:
        raise Forbidden(
            "adapters cannot be changed over HTTP here. Ways to open that: --admin-api-key KEY (then send it as "
            "Authorization: Bearer KEY), --allow-runtime-lora-updating or VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 (every "
            "client that can connect may load), or a loopback bind (--host 127.0.0.1)",
            code="runtime_loads_closed",
        )


def is_loopback(host: str) -> bool:
    """Whether a host name or address means this machine."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host.strip("[]").partition("%")[0]).is_loopback
    except ValueError:
        return False


def bound_host(config: TokenizerConfig) -> str:
    """The host that the server was told to bind."""
    return str(config.server_info.get("host") or DEFAULT_HOST)


def _check_key(key: str, header: str) -> None:
    scheme, _, given = header.partition(" ")
    is_right = secrets.compare_digest(given.strip().encode("utf-8", "surrogateescape"), key.encode())
    if scheme.lower() != "bearer" or not is_right:
        raise Unauthorized(
            "changing adapters needs the admin key: send it as Authorization: Bearer KEY", code="invalid_api_key"
        )


def _check_host(config: TokenizerConfig, request: web.Request) -> None:
    bound = bound_host(config)
    host = _host_name(request.headers.get("Host", ""))
    if host is None:
        raise Forbidden("the Host header is missing or malformed", code="bad_host")
    if is_loopback(bound) and not is_loopback(host) and host != bound.lower():
        raise Forbidden(f"the Host header names {host}, and this server is bound to {bound}", code="bad_host")


def _host_name(header: str) -> str | None:
    """The name or address in a Host header, without the port; None for a malformed header."""
    if not header or any(character in header for character in "/@?#\\ \t"):
        return None
    try:
        parts = urlsplit(f"//{header}")
        _ = parts.port  # raises if it is not a number
    except ValueError:
        return None
    return parts.hostname
