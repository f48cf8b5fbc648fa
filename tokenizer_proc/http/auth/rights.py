"""The rights that routes need, and the middleware that checks a call's key against them and finds its tenant.

A route declares the rights that it needs. The middleware looks them up by the route object, never by the path's text.
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
    """The key that a route needs from its caller, if the server has keys."""

    NONE = "none"
    """No key is needed. For probes such as /health."""
    INFERENCE = "inference"
    """Any API key for inference."""
    OPERATOR = "operator"
    """An inference key that may name every adapter, because the route shows or ends the calls of other tenants."""
    ADMIN = "admin"
    """The admin key, or, on a server without one, the same key as OPERATOR. `admin.admit` must accept the call too."""


TENANT = web.RequestKey("tenant", Tenant)
"""The key under which an authenticated request stores its tenant."""

RIGHTS: web.AppKey[dict[web.AbstractRoute, Rights]] = web.AppKey("rights", dict)
"""The key under which an application stores the rights of its routes."""


def middleware(config: TokenizerConfig) -> Middleware:
    """Returns the middleware that checks a call's rights. A path without a route needs an inference key."""
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
    """Returns the tenant that made this call."""
    return request[TENANT]
