"""Tenants: whom a key belongs to, what they may name, and how much they may ask. Knows nothing of HTTP or text.

A rate is a bucket that holds a minute's worth and fills steadily. Tokens are charged when they are known, so a bucket
can be overdrawn once; then it has to fill again first.
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
    """What may still be used of a rate per minute."""

    def __init__(self, per_minute: float | None, clock: Clock) -> None:
        self._rate = None if per_minute is None else per_minute / 60
        self._full = per_minute or 0.0
        self._level = self._full
        self._clock = clock
        self._filled = clock()

    def take(self, amount: float) -> None:
        """Uses so much, more than there is if need be."""
        self._fill()
        self._level -= amount

    def wait(self, amount: float) -> float:
        """Seconds until so much is there (at most a whole minute's worth is waited for)."""
        self._fill()
        missing = min(amount, self._full) - self._level
        return 0.0 if self._rate is None or missing <= 0 else missing / self._rate

    def _fill(self) -> None:
        now = self._clock()
        if self._rate is not None:
            self._level = min(self._full, self._level + (now - self._filled) * self._rate)
        self._filled = now


class Tenant:
    """The holder of one key; without keys, everyone."""

    def __init__(self, rules: ApiKey | None = None, clock: Clock = time.monotonic) -> None:
        self._rules = rules or ApiKey(key="")
        self._requests = _Bucket(self._rules.requests_per_minute, clock)
        self._tokens = _Bucket(self._rules.tokens_per_minute, clock)

    @property
    def name(self) -> str:
        """What keeps this tenant apart from others."""
        return self._rules.tenant

    @property
    def is_restricted(self) -> bool:
        """Whether there are adapters that this tenant may not name."""
        return "*" not in self._rules.adapters

    def may_use(self, adapter: str) -> bool:
        """Whether this tenant may name the adapter; what it may not does not exist for it."""
        return any(fnmatchcase(adapter, pattern) for pattern in self._rules.adapters)

    def admit(self, loras: Sequence[str | AdapterMix | None]) -> None:
        """One call with these requests. Raises NotFound for the base where that is not allowed, RateLimited."""
        if not self._rules.base and None in loras:
            raise NotFound("this key may not use the base model without an adapter", param="model")
        wait = max(self._requests.wait(len(loras)), self._tokens.wait(1))
        if wait > 0:
            raise RateLimited("this key has used up its rate; try again later", retry_after=wait)
        self._requests.take(len(loras))

    def charge(self, tokens: int) -> None:
        """What the call used in the end."""
        self._tokens.take(tokens)


class Tenants:
    """Everyone who holds a key. Keys are looked up by their hash: how long that takes says nothing of any key."""

    def __init__(self, keys: Sequence[ApiKey]) -> None:
        self._everyone = None if keys else Tenant()
        self._by_hash = {_hash(one.key): Tenant(one) for one in keys}

    def authenticate(self, authorization: str) -> Tenant:
        """Whose `Authorization: Bearer KEY` this is. Raises Unauthorized."""
        if self._everyone is not None:
            return self._everyone
        scheme, _, key = authorization.partition(" ")
        tenant = self._by_hash.get(_hash(key.strip())) if scheme.lower() == "bearer" else None
        if tenant is None:
            raise Unauthorized(
                "a valid API key is needed: send it as Authorization: Bearer KEY", code="invalid_api_key"
            )
        return tenant


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
