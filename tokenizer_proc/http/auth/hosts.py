"""Checks which host a call names, so that no web page can call a server on this machine through a browser.

A page of evil.example may let its own name resolve to 127.0.0.1 (DNS rebinding). The browser then sends its calls here,
but with `Host: evil.example`. A server on a loopback address therefore takes calls only under names of this machine and
those of --allowed-hosts, whatever the call is; one on another address does so where --allowed-hosts is given.
"""

from __future__ import annotations

import contextlib
import ipaddress
import re
import socket
from collections.abc import Sequence

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from engine.config.process_configs import TokenizerConfig
from engine.errors import Forbidden

DEFAULT_HOST = "127.0.0.1"
LONGEST_NAME = 253  # of a DNS name

_AUTHORITY = re.compile(r"(?:\[(?P<ip6>[0-9A-Fa-f:.]+)\]|(?P<name>[0-9A-Za-z._-]+))(?::(?P<port>[0-9]{0,5}))?")
_ABSOLUTE = re.compile(r"[A-Za-z][0-9A-Za-z+.-]*://(?P<authority>[^/?#]*)")


def host_name(authority: str) -> str | None:
    """Returns the name or address in a Host header, in lower case and without the port; None for a malformed header.

    An IPv6 address is returned without its brackets; zones, user names and escapes make a header malformed.
    """
    match = _AUTHORITY.fullmatch(authority)
    if match is None or int(match["port"] or 0) > 65535:
        return None
    if match["ip6"]:
        with contextlib.suppress(ValueError):
            return str(ipaddress.IPv6Address(match["ip6"]))
        return None
    name = match["name"].lower().removesuffix(".")
    return name if len(name) <= LONGEST_NAME and all(name.split(".")) else None


def is_loopback(host: str) -> bool:
    """Returns whether a host name or address is a loopback one, which refers to this machine."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    with contextlib.suppress(ValueError):
        address = ipaddress.ip_address(host.strip("[]"))
        mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
        return (mapped or address).is_loopback
    return False


def bound_host(config: TokenizerConfig) -> str:
    """Returns the host that the server is configured to bind to."""
    return str(config.server_info.get("host") or DEFAULT_HOST)


def middleware(config: TokenizerConfig) -> Middleware:
    """Returns the middleware that refuses calls under names that are not this server's."""
    hosts = _Hosts(config)

    @web.middleware
    async def check_host(request: web.Request, handler: Handler) -> web.StreamResponse:
        hosts.check(request)
        return await handler(request)

    return check_host


class _Hosts:
    """The names under which a server takes calls."""

    def __init__(self, config: TokenizerConfig) -> None:
        self._bound = bound_host(config)
        self._allowed = [pattern.lower().removesuffix(".") for pattern in config.allowed_hosts]
        self._is_checked = (_is_bound_to_loopback(config) or bool(self._allowed)) and "*" not in self._allowed

    def check(self, request: web.Request) -> None:
        """Raises Forbidden if a call names another host. A call of HTTP/1.0 may name none, as no browser sends that."""
        if not self._is_checked:
            return
        given = request.headers.getall("Host", [])
        target = _ABSOLUTE.match(request.raw_path)
        if len(given) > 1 or not (given or request.version < (1, 1)):
            raise Forbidden("send one Host header", code="bad_host")
        for authority in [*given, *([] if target is None else [target["authority"]])]:
            self._check_one(authority)

    def _check_one(self, authority: str) -> None:
        host = host_name(authority)
        if host is None:
            raise Forbidden("the Host header is malformed: send the server's name or address", code="bad_host")
        if not (is_loopback(host) or host == self._bound.lower() or self._is_allowed(host)):
            raise Forbidden(
                f"the call is for the host {host}, and this server is bound to {self._bound}: a server behind a proxy "
                f"needs --allowed-hosts {host}",
                code="bad_host",
            )

    def _is_allowed(self, host: str) -> bool:
        return any(_matches(host, pattern) for pattern in self._allowed)


def _matches(host: str, pattern: str) -> bool:
    """Returns whether `host` is `pattern`, or, for a pattern like *.example.com, a name below example.com."""
    if pattern.startswith("*."):
        return host.endswith(pattern[1:]) and host != pattern[1:]
    return host == pattern.strip("[]")


def _is_bound_to_loopback(config: TokenizerConfig) -> bool:
    """Returns whether only this machine can connect, by the socket's address: a name may resolve to a loopback one."""
    if is_loopback(bound_host(config)):
        return True
    return config.listen_fd is not None and is_loopback(_address(config.listen_fd))


def _address(descriptor: int) -> str:
    with socket.socket(fileno=socket.dup(descriptor)) as listener:
        name: Sequence[object] = listener.getsockname()
    return str(name[0])
