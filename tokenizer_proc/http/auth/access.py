"""Who asks, and what exists for them: a key's holder, and the adapters that it may name.

A route declares the rights that it needs; the gate looks them up by the route, never by the text of a path. An adapter
that a key may not use does not exist for its holder: not in a list, not in an error. Knows no dialect.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from engine.config.sections import TokenizerConfig
from engine.errors import Forbidden, NotFound
from engine.messages import AdapterCard, AdapterMix
from tokenizer_proc.http.auth import admin
from tokenizer_proc.http.generation import TENANT, Service, deadline, holder
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
    """The admin key; where there is none, as OPERATOR. In both cases from where api.admin lets adapters be changed."""


RIGHTS: web.AppKey[dict[web.AbstractRoute, Rights]] = web.AppKey("rights", dict)
"""Where an app keeps the rights that its routes declare."""


def gate(config: TokenizerConfig) -> Middleware:
    """The middleware that checks a route's rights. An address without a route needs an inference key."""
    tenants = Tenants(config.api_keys)

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        rights = request.app[RIGHTS].get(request.match_info.route, Rights.INFERENCE)
        by_admin_key = rights is Rights.ADMIN and config.admin_key is not None
        if rights is not Rights.NONE and not by_admin_key:
            tenant = request[TENANT] = tenants.of(request.headers.get("Authorization", ""))
            if rights is not Rights.INFERENCE and tenant.is_restricted:
                raise Forbidden(f"{request.path} is not for a key with rules on adapters", code="restricted_key")
        if rights is Rights.ADMIN:
            admin.admit(config, request)
        return await handler(request)

    return middleware


async def fetch(service: Service, request: web.Request, model: str | None, *loras: str | AdapterMix | None) -> None:
    """Loads what is named and not known yet, where the engine does that, as far as it exists for the caller."""
    tenant = holder(request)
    _check(service, tenant, model, loras)
    async with deadline(service, request).kept():
        await service.frontend.fetch(model, *loras, may_use=tenant.may_use)


def select(
    service: Service, request: web.Request, model: str | None, lora: str | AdapterMix | None
) -> str | AdapterMix | None:
    """What `model` and `lora_path` together name. Raises NotFound for what does not exist for the caller."""
    tenant = holder(request)
    _check(service, tenant, model, [lora])
    try:
        return service.frontend.adapters.select(model, lora)
    except NotFound as error:
        if tenant.is_restricted:  # the error would list what there is
            raise _unknown(str(model if error.param == "model" else lora), error.param) from None
        raise


def seen(request: web.Request, cards: Iterable[AdapterCard]) -> list[AdapterCard]:
    """The adapters that exist for the caller."""
    tenant = holder(request)
    return [card for card in cards if tenant.may_use(card.name)]


def _check(service: Service, tenant: Tenant, model: str | None, loras: Iterable[str | AdapterMix | None]) -> None:
    """Raises NotFound, in the client's own words, unless the adapters that are named may be used."""
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
