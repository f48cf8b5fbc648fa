"""Tenants: the callers by their keys, with what each may do, which adapters it may name, and its rates."""

from __future__ import annotations

import contextlib
import enum
import hashlib
import math
import secrets
import time
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

from engine.config.api_keys import ApiKey
from engine.errors import RateLimited
from engine.messages import Submit
from tokenizer_proc.http.auth.grants import Grant, Meter
from tokenizer_proc.http.auth.rates import Clock, Rate


class Role(enum.IntEnum):
    """What a caller may do. Each role may do what the ones before it may."""

    CLIENT = 0
    """Inference, and its own requests."""
    OPERATOR = 1
    """The requests of every caller and the state of the server; adapters too, where there is no admin key."""
    ADMIN = 2
    """Adapters, on a server that has an admin key."""


class Tenant:
    """A caller. By default it has no key and no limits.

    `name` separates this tenant's KV pages and shares from those of other tenants. `owner` is whose requests are this
    caller's own: all keys that name the same tenant share them, and a key that names none has its own.
    """

    def __init__(
        self,
        rules: ApiKey | None = None,
        role: Role = Role.CLIENT,
        clock: Clock = time.monotonic,
    ) -> None:
        self._rules = rules or ApiKey(key="")
        self.role = role
        self.name = self._rules.tenant
        self.has_key = rules is not None
        self.owner = f"tenant {self.name}" if self.name else f"key {_hash(self._rules.key).hex()}"
        self._requests = Rate(self._rules.requests_per_minute, clock)
        self._tokens = Rate(self._rules.tokens_per_minute, clock)

    @property
    def may_use_base(self) -> bool:
        """Whether this tenant may use the base model without an adapter."""
        return self._rules.base

    @property
    def is_restricted(self) -> bool:
        """Whether this tenant may name only some of the models."""
        return "*" not in self._rules.adapters or not self._rules.base

    def may_use(self, adapter: str) -> bool:
        """Returns whether this tenant may name the adapter. Adapters that it may not name are hidden from it."""
        return any(fnmatchcase(adapter, pattern) for pattern in self._rules.adapters)

    @contextlib.contextmanager
    def granted(self, submits: Sequence[Submit]) -> Iterator[Grant]:
        """Admits a call with these submits while entered, and charges it to the tenant's rates.

        On leaving, the tokens beyond `Grant.used` are given back. Raises RateLimited if a rate is used up, and
        InvalidRequest if the call alone exceeds a rate.
        """
        grant = Grant(self._requests, self._tokens, submits)
        try:
            yield grant
        except RateLimited:
            grant.forget()
            raise
        finally:
            grant.settle()

    def rate_headers(self) -> dict[str, str]:
        """Returns OpenAI's x-ratelimit headers for the rates that this tenant has: limit, remaining, and reset."""
        headers = {}
        for what, rate in (("requests", self._requests), ("tokens", self._tokens)):
            if rate.limit is not None:
                headers[f"x-ratelimit-limit-{what}"] = str(int(rate.limit))
                headers[f"x-ratelimit-remaining-{what}"] = str(int(rate.left))
                headers[f"x-ratelimit-reset-{what}"] = f"{math.ceil(rate.reset)}s"
        return headers

    @contextlib.contextmanager
    def metered(self, most: int) -> Iterator[Meter]:
        """Charges work on up to `most` tokens to the token rate while entered, such as that of /tokenize.

        On leaving, the tokens beyond `Meter.used` are given back. Raises RateLimited if the rate is used up.
        """
        meter = Meter(self._tokens, most)
        try:
            yield meter
        finally:
            meter.settle()


class Tenants:
    """The callers by key. Keys are looked up by hash, so that the time of a look-up reveals nothing about a key.

    A sole API key is the operator's, if it has no rules and there is no admin key: there is nobody else to protect.
    """

    def __init__(self, keys: Sequence[ApiKey], admin_key: str | None = None) -> None:
        is_sole = admin_key is None and list(keys) == [ApiKey(key=keys[0].key)] if keys else False
        self._by_hash = {
            _hash(one.key): Tenant(one, Role.OPERATOR if one.operator or is_sole else Role.CLIENT) for one in keys
        }
        self._admin_hash = None if admin_key is None else _hash(admin_key)
        self._admin = Tenant(ApiKey(key=admin_key or ""), Role.ADMIN)
        self._keyless = Tenant(role=Role.OPERATOR if admin_key is None else Role.CLIENT) if not keys else None

    def identify(self, authorization: str) -> Tenant | None:
        """Returns the caller that sent this Authorization header, or None if a key is needed and this is none.

        The header is `Bearer KEY`. On a server without API keys, a caller without the admin key is the keyless one.
        """
        scheme, _, key = authorization.partition(" ")
        if scheme.lower() == "bearer":
            hashed = _hash(key.strip())
            if self._admin_hash is not None and secrets.compare_digest(hashed, self._admin_hash):
                return self._admin
            if hashed in self._by_hash:
                return self._by_hash[hashed]
        return self._keyless


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
