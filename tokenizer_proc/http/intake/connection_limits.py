"""The limits on open connections: of one address, in all, and by the number of files that the process may open."""

from __future__ import annotations

import ipaddress
import os
import resource
from collections import Counter
from typing import Protocol

RESERVED_FILES = 128  # for the files of adapters, sockets to other processes, and connections that are refused
LOOPBACK_NETWORKS = ("127.", "::1", "::ffff:127.")


class Closable(Protocol):
    """A connection as the limits see it."""

    @property
    def is_idle(self) -> bool:
        """Whether no request is in progress, and no part of one has arrived."""

    def close_idle(self) -> None:
        """Closes the connection, which is idle; `leave` is called before this returns."""

    def check_head(self, now: float) -> None:
        """Closes the connection if the head of a request is overdue at the time `now` of the event loop."""


class ConnectionLimits:
    """The open connections. `per_address` None: a quarter of `total`, and all of it for loopback addresses."""

    def __init__(self, total: int, per_address: int | None) -> None:
        self.total = total
        self._per_address = per_address
        self._open: dict[Closable, str] = {}
        self._by_address: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._open)

    @property
    def connections(self) -> list[Closable]:
        """The open connections, the oldest first."""
        return list(self._open)

    def enter(self, connection: Closable, peer: str | None) -> str | None:
        """Adds a connection from the address `peer`. Returns None, or why it is refused.

        At a limit the connection that has been open for longest of those that are idle is closed, if there is one.
        """
        address = network(peer)
        bound = self._bound_of(address)
        if self._by_address[address] >= bound and not self._close_one_idle(address):
            return f"this address has {bound} open connections (--max-connections-per-address)"
        if len(self._open) >= self.total and not self._close_one_idle(None):
            return f"{self.total} connections are open (--max-connections, or the limit on open files)"
        self._open[connection] = address
        self._by_address[address] += 1
        return None

    def leave(self, connection: Closable) -> None:
        """Takes out a connection that is closed. One that was refused is not in."""
        address = self._open.pop(connection, None)
        if address is not None:
            self._by_address[address] -= 1
            if not self._by_address[address]:
                del self._by_address[address]

    def _bound_of(self, address: str) -> int:
        if self._per_address is not None:
            return self._per_address
        return self.total if address.startswith(LOOPBACK_NETWORKS) else max(1, self.total // 4)

    def _close_one_idle(self, address: str | None) -> bool:
        for connection, of in self._open.items():
            if connection.is_idle and address in (None, of):
                connection.close_idle()
                return True
        return False


def network(peer: str | None) -> str:
    """Returns what counts as one address: an IPv4 address, or the first 64 bits of an IPv6 one."""
    address = (peer or "127.0.0.1").partition("%")[0]
    if ":" not in address:
        return address
    whole = ipaddress.IPv6Address(address)
    if whole.ipv4_mapped is not None:
        return str(whole.ipv4_mapped)
    return "::1" if whole.is_loopback else str(ipaddress.IPv6Network((whole, 64), strict=False).network_address)


def allowed_by_files(wanted: int) -> int:
    """Returns how many of `wanted` connections the limit on open files allows, after raising it as far as it may be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/proc/self/fd")) + RESERVED_FILES
    needed = wanted + used
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return wanted if soft == resource.RLIM_INFINITY else max(1, min(wanted, soft - used))
