"""Selects the adapters that a call names, after checking that the call's key may use them, and loads unknown ones.

An adapter that a tenant's key may not use is hidden from the tenant: no list and no error message shows it.
"""

from __future__ import annotations

from collections.abc import Iterable

from aiohttp import web

from engine.errors import NotFound
from engine.messages import AdapterCard, AdapterMix
from tokenizer_proc.adapters.registry import UnknownModel
from tokenizer_proc.http.auth.api_keys import Tenant
from tokenizer_proc.http.auth.rights import tenant_of
from tokenizer_proc.http.service import Service, deadline_of


async def fetch(service: Service, request: web.Request, model: str | None, *loras: str | AdapterMix | None) -> None:
    """Loads the named adapters that are unknown and lie under --lora-resolve-root.

    Raises NotFound for an adapter that the tenant may not use, and TimedOut if the call's deadline passes meanwhile.
    """
    tenant = tenant_of(request)
    _check(service, tenant, model, loras)
    async with deadline_of(service, request).kept():
        await service.frontend.fetch(model, *loras, may_use=tenant.may_use)


def select(
    service: Service, request: web.Request, model: str | None, lora: str | AdapterMix | None
) -> str | AdapterMix | None:
    """Returns the adapters that `model` and `lora_path` name, or None for the base model.

    Raises NotFound for an adapter, or the base model, that does not exist or that the tenant may not use.
    """
    tenant = tenant_of(request)
    _check(service, tenant, model, [lora])
    selected = service.frontend.adapters.select(model, lora)
    if selected is None and not tenant.may_use_base:
        raise _no_base(model)
    return selected


def visible(request: web.Request, cards: Iterable[AdapterCard]) -> list[AdapterCard]:
    """Returns those of `cards` whose adapters the tenant may use."""
    tenant = tenant_of(request)
    return [card for card in cards if tenant.may_use(card.name)]


def _check(service: Service, tenant: Tenant, model: str | None, loras: Iterable[str | AdapterMix | None]) -> None:
    """Raises NotFound unless the tenant may use every named adapter. The error quotes only the name from the client."""
    for lora in loras:
        for name in [] if lora is None else [lora] if isinstance(lora, str) else lora:
            if not tenant.may_use(name):
                raise _unknown(name, "lora_path")
    meant = service.frontend.adapters.meaning(model)
    if model is not None and meant is not None and not tenant.may_use(meant):
        raise _unknown(model, "model")


def _unknown(name: str, param: str) -> NotFound:
    code = "model_not_found" if param == "model" else None
    return UnknownModel("", name, param=param, code=code).without_list()


def _no_base(model: str | None) -> NotFound:
    if model is not None:
        return _unknown(model, "model")
    text = "this key may not use the base model without an adapter: name an adapter"
    return NotFound(text, param="model", code="model_not_found")
