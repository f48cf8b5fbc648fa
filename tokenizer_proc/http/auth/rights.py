"""The rights that routes need, and the middleware that finds a call's tenant by its key and checks its rights.

    rights       no key   wrong key   a key   operator's key   admin key
    none         yes      yes         yes     yes              yes
    inference    401      401         yes     yes              yes
    own          401      401         yes     yes              yes          what is not the caller's does not exist
    operator     401      401         403     yes              yes
    admin        401      401         403     403              yes          without an admin key: an operator's key

On a server without API keys, a call without a key has a tenant all the same: the operator, or, where there is an admin
key, a client that owns no requests. A route declares the rights that it needs, and the middleware looks them up by the
route object, never by the path's text.
"""

from __future__ import annotations

import enum

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from engine.config.process_configs import TokenizerConfig
from engine.errors import Forbidden, Unauthorized
from tokenizer_proc.adapters.registry import UnknownModel
from tokenizer_proc.http.auth.api_keys import Role, Tenant, Tenants


class Rights(enum.Enum):
    """What a route needs from its caller, if the server has keys."""

    NONE = "none"
    """No key is needed. For probes such as /health."""
    INFERENCE = "inference"
    """Any key."""
    OWN = "own requests"
    """Any key. The handler acts on the caller's own requests only, and on those of all callers for an operator."""
    OPERATOR = "operator"
    """An operator's key, because the route shows the server's configuration or the calls of other tenants."""
    ADMIN = "admin"
    """The admin key, or, on a server without one, an operator's key, where adapters may be changed at all."""


TENANT = web.RequestKey("tenant", Tenant)
"""The key under which a request stores its tenant, if its key is known."""

RIGHTS: web.AppKey[dict[web.AbstractRoute, Rights]] = web.AppKey("rights", dict)
"""The key under which an application stores the rights of its routes."""

_KEYS = 'the admin key (--admin-api-key) or a key with "operator": true in --api-key-file'


def middleware(config: TokenizerConfig) -> Middleware:
    """Returns the middleware that checks a call's rights. A path without a route needs an inference key."""
    tenants = Tenants(config.api_keys, config.admin_key)

    @web.middleware
    async def check_rights(request: web.Request, handler: Handler) -> web.StreamResponse:
        tenant = tenants.identify(request.headers.get("Authorization", ""))
        if tenant is not None:
            request[TENANT] = tenant
        _check(config, request, tenant)
        try:
            return await handler(request)
        except UnknownModel as error:
            if tenant is not None and tenant.is_restricted:  # the error lists what the tenant may not see
                raise error.without_list() from None
            raise

    return check_rights


def tenant_of(request: web.Request) -> Tenant:
    """Returns the tenant that made this call, on a route that needs any rights."""
    return request[TENANT]


def is_operator(request: web.Request) -> bool:
    """Returns whether an operator made this call, also on a route that needs no rights."""
    tenant = request.get(TENANT)
    return tenant is not None and tenant.role >= Role.OPERATOR


async def add_rates(request: web.Request, response: web.StreamResponse) -> None:
    """Adds headers that tell a caller what is left of its rates, if its key has any."""
    tenant = request.get(TENANT)
    if tenant is not None:
        response.headers.update(tenant.rate_headers())


def check_operator(request: web.Request) -> None:
    """Raises Unauthorized or Forbidden if no operator made this call, also on a route that needs no rights."""
    tenant = request.get(TENANT)
    if tenant is None:
        raise _unauthorized("an operator's key")
    _check_role(request, tenant, Role.OPERATOR, _KEYS)


def rights_of(request: web.Request) -> Rights:
    """Returns the rights that a call needs: those of its route, and without a route those of inference."""
    if request.match_info.http_exception is not None:  # no such path or method
        return Rights.INFERENCE
    return request.app[RIGHTS].get(request.match_info.route, Rights.ADMIN)


def _check(config: TokenizerConfig, request: web.Request, tenant: Tenant | None) -> None:
    """Raises Unauthorized or Forbidden if the tenant may not make this call. `tenant` None: its key is not known."""
    rights = rights_of(request)
    if rights is Rights.NONE:
        return
    if tenant is None:
        raise _unauthorized("a valid API key")
    match rights:
        case Rights.OWN if tenant.role < Role.OPERATOR and not tenant.has_key:
            raise _unauthorized("the admin key")
        case Rights.OPERATOR:
            _check_role(request, tenant, Role.OPERATOR, _KEYS)
        case Rights.ADMIN if config.admin_key is not None:
            _check_role(request, tenant, Role.ADMIN, "the admin key (--admin-api-key)")
        case Rights.ADMIN:
            _check_role(request, tenant, Role.OPERATOR, _KEYS)
            _check_runtime_loads(config)


def _check_role(request: web.Request, tenant: Tenant, role: Role, keys: str) -> None:
    if tenant.role >= role:
        return
    if not tenant.has_key:
        raise _unauthorized("the admin key")
    raise Forbidden(f"{request.path} is not for this key: it needs {keys}", code="not_for_this_key")


def _check_runtime_loads(config: TokenizerConfig) -> None:
    if not config.runtime_loads:
        raise Forbidden(
            "adapters cannot be changed over HTTP here. Ways to open that: --admin-api-key KEY (then send it as "
            "Authorization: Bearer KEY), --allow-runtime-lora-updating or VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 (every "
            "operator's key may load, and without keys every client that can connect), or a loopback bind "
            "(--host 127.0.0.1)",
            code="runtime_loads_closed",
        )


def _unauthorized(key: str) -> Unauthorized:
    return Unauthorized(f"{key} is needed: send it as Authorization: Bearer KEY", code="invalid_api_key")
