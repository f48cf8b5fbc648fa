"""The rights of a call: which key its route needs. The middleware authenticates the key and finds its tenant.

A route declares the rights that it needs; the middleware looks them up by the route, never by the text of a path.
Knows no dialect.
"""

from __future__ import annotations

import enum

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from engine.config.process_configs import TokenizerConfig
from engine.errors import Forbidden
from tokenizer_proc.http.auth import admin
from tokenizer_proc.http.auth.api_keys import Tenant, Tenants


class Rights(enum.Enum):
    """What a route needs of its caller, where the server has keys."""

    NONE = "none"
    """No key: probes."""
    INFERENCE = "inference"
    """Any inference key."""
    OPERATOR = "operator"
    """An inference key that may name every adapter: the route shows, or ends, the calls of other tenants."""
    ADMIN = "admin"
    """The admin key; where there is none, as OPERATOR. In both cases only from hosts that `admin.admit` accepts."""


TENANT = web.RequestKey("tenant", Tenant)
"""Where an authenticated request carries its tenant."""

RIGHTS: web.AppKey[dict[web.AbstractRoute, Rights]] = web.AppKey("rights", dict)
"""Where an app keeps the rights that its routes declare."""


def middleware(config: TokenizerConfig) -> Middleware:
    """The middleware that checks a route's rights. A path without a route needs an inference key."""
    tenants = Tenants(config.api_keys)

    @web.middleware
    async def check_rights(request: web.Request, handler: Handler) -> web.StreamResponse:
        rights = request.app[RIGHTS].get(request.match_info.route, Rights.INFERENCE)
        by_admin_key = rights is Rights.ADMIN and config.admin_key is not None
        if rights is not Rights.NONE and not by_admin_key:
            tenant = request[TENANT] = tenants.authenticate(request.headers.get("Authorization", ""))
            if rights is not Rights.INFERENCE and tenant.is_restricted:
                raise Forbidden(f"{request.path} is not for a key with rules on adapters", code="restricted_key")
        if rights is Rights.ADMIN:
            admin.admit(config, request)
        return await handler(request)

    return check_rights


def tenant_of(request: web.Request) -> Tenant:
    """The tenant whose call this is."""
    return request[TENANT]
