"""Decides which HTTP calls may change adapters.

with an admin key   calls that send the key                                      else 401
without one         on a loopback bind, or where the operator allowed it         else 403
on a loopback bind  the Host header must name this machine, so that a web page   else 403
                    whose name resolves to it cannot call (DNS rebinding)
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
    """Raises Unauthorized or Forbidden if this call may not change adapters."""
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
    """Returns whether a host name or address is a loopback one, which refers to this machine."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host.strip("[]").partition("%")[0]).is_loopback
    except ValueError:
        return False


def bound_host(config: TokenizerConfig) -> str:
    """Returns the host that the server is configured to bind to."""
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
    """Returns the name or address in a Host header, without the port, or None for a malformed header."""
    if not header or any(character in header for character in "/@?#\\ \t"):
        return None
    try:
        parts = urlsplit(f"//{header}")
        _ = parts.port  # raises ValueError if the port is not a number
    except ValueError:
        return None
    return parts.hostname
