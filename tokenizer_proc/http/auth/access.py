"""The rights of a call: which key a route needs, and which adapters the key's tenant may name.

A route declares the rights that it needs; the middleware looks them up by the route, never by the text of a path. For a
tenant, an adapter that its key may not use does not exist: it is in no list and in no error. Knows no dialect.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from engine.config.process_configs import TokenizerConfig
from engine.errors import Forbidden, NotFound
from engine.messages import AdapterCard, AdapterMix
from tokenizer_proc.http.auth import admin
from tokenizer_proc.http.service import TENANT, Service, deadline_of, tenant_of
from tokenizer_proc.requests.tenants import Tenant, Tenants


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


async def fetch(service: Service, request: web.Request, model: str | None, *loras: str | AdapterMix | None) -> None:
    """Loads the named adapters that are not known yet, if the tenant may use them and --lora-resolve-root has them."""
    tenant = tenant_of(request)
    _check(service, tenant, model, loras)
    async with deadline_of(service, request).kept():
        await service.frontend.fetch(model, *loras, may_use=tenant.may_use)


def select(
    service: Service, request: web.Request, model: str | None, lora: str | AdapterMix | None
) -> str | AdapterMix | None:
    """The adapters that `model` and `lora_path` together name. Raises NotFound for one that the tenant may not use."""
    tenant = tenant_of(request)
    _check(service, tenant, model, [lora])
    try:
        return service.frontend.adapters.select(model, lora)
    except NotFound as error:
        if tenant.is_restricted:  # the error would list adapters that the tenant may not see
            raise _unknown(str(model if error.param == "model" else lora), error.param) from None
        raise


def visible(request: web.Request, cards: Iterable[AdapterCard]) -> list[AdapterCard]:
    """The adapters that the tenant may use."""
    tenant = tenant_of(request)
    return [card for card in cards if tenant.may_use(card.name)]


def _check(service: Service, tenant: Tenant, model: str | None, loras: Iterable[str | AdapterMix | None]) -> None:
    """Raises NotFound, which quotes the client's own name, unless the tenant may use every adapter that is named."""
    for lora in loras:
        for name in [] if lora is None else [lora] if isinstance(lora, str) else lora:
            if not tenant.may_use(name):
                raise _unknown(name, "lora_path")
    meant = service.frontend.adapters.meanings(model)
    if model is not None and meant and not any(map(tenant.may_use, meant)):
        raise _unknown(model, "model")


def _unknown(name: str, param: str | None) -> NotFound:
    code = "model_not_found" if param == "model" else None
    return NotFound(f"`{name}` does not exist, or this key may not use it", param=param, code=code)
