"""Tenants: the holders of API keys, with the adapters that each may name, and its rate limits.

A rate limit is a token bucket that holds a minute's worth and fills steadily. Tokens are charged only when a call ends,
so a bucket can be overdrawn; no call of the tenant is admitted until the bucket has refilled to a positive level.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase

from engine.config.api_keys import ApiKey
from engine.errors import NotFound, RateLimited, Unauthorized
from engine.messages import AdapterMix

Clock = Callable[[], float]


class _Bucket:
    """A token bucket that fills at a rate per minute. A rate of None means no limit."""

    def __init__(self, per_minute: float | None, clock: Clock) -> None:
        self._rate = None if per_minute is None else per_minute / 60
        self._full = per_minute or 0.0
        self._level = self._full
        self._clock = clock
        self._filled = clock()

    def use(self, amount: float) -> None:
        """Takes `amount` out of the bucket, even if the bucket holds less."""
        self._fill()
        self._level -= amount

    def wait(self, amount: float) -> float:
        """Returns the seconds until the bucket holds `amount`, or is full if it cannot hold that much."""
        self._fill()
        missing = min(amount, self._full) - self._level
        return 0.0 if self._rate is None or missing <= 0 else missing / self._rate

    def _fill(self) -> None:
        now = self._clock()
        if self._rate is not None:
            self._level = min(self._full, self._level + (now - self._filled) * self._rate)
        self._filled = now


class Tenant:
    """The holder of one API key. On a server without keys, all calls belong to one tenant without limits."""

    def __init__(self, rules: ApiKey | None = None, clock: Clock = time.monotonic) -> None:
        self._rules = rules or ApiKey(key="")
        self._requests = _Bucket(self._rules.requests_per_minute, clock)
        self._tokens = _Bucket(self._rules.tokens_per_minute, clock)

    @property
    def name(self) -> str:
        """The name that separates this tenant's KV pages and shares from those of other tenants."""
        return self._rules.tenant

    @property
    def is_restricted(self) -> bool:
        """Whether this tenant may name only some of the adapters."""
        return "*" not in self._rules.adapters

    def may_use(self, adapter: str) -> bool:
        """Returns whether this tenant may name the adapter. Adapters that it may not name are hidden from it."""
        return any(fnmatchcase(adapter, pattern) for pattern in self._rules.adapters)

    def admit(self, loras: Sequence[str | AdapterMix | None]) -> None:
        """Admits a call with one request for each item of `loras`, and charges the requests to the tenant's rate.

        Raises NotFound for a request to the base model if the tenant may not use it, and RateLimited if the tenant has
        used up a rate.
        """
        if not self._rules.base and None in loras:
            raise NotFound("this key may not use the base model without an adapter", param="model")
        wait = max(self._requests.wait(len(loras)), self._tokens.wait(1))
        if wait > 0:
            raise RateLimited("this key has used up its rate; try again later", retry_after=wait)
        self._requests.use(len(loras))

    def charge(self, tokens: int) -> None:
        """Charges `tokens`, which a call used, to the tenant's token rate."""
        self._tokens.use(tokens)


class Tenants:
    """The tenants by key. Keys are looked up by hash, so that the time of a look-up reveals nothing about a key."""

    def __init__(self, keys: Sequence[ApiKey]) -> None:
        self._keyless = None if keys else Tenant()
        self._by_hash = {_hash(one.key): Tenant(one) for one in keys}

    def authenticate(self, authorization: str) -> Tenant:
        """Returns the tenant of an `Authorization: Bearer KEY` header. Raises Unauthorized if there is no such key."""
        if self._keyless is not None:
            return self._keyless
        scheme, _, key = authorization.partition(" ")
        tenant = self._by_hash.get(_hash(key.strip())) if scheme.lower() == "bearer" else None
        if tenant is None:
            raise Unauthorized(
                "a valid API key is needed: send it as Authorization: Bearer KEY", code="invalid_api_key"
            )
        return tenant


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
