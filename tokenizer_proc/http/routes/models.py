"""The routes that show the base model, its tokenizer and the adapters: /v1/models, /model_info, /tokenizer_info."""

from __future__ import annotations

import functools
from typing import Any

import msgspec
from aiohttp import web

from engine.errors import NotFound
from engine.messages import AdapterCard
from tokenizer_proc.http import adapter_access
from tokenizer_proc.http.auth.rights import tenant_of
from tokenizer_proc.http.encoding import as_json
from tokenizer_proc.http.service import Service
from tokenizer_proc.text import files

OWNER = "chorus"


async def list_models(service: Service, request: web.Request) -> web.StreamResponse:
    """Lists the base model under each of its names, then the adapters, with path, parent, revision, rank and state.

    Only those are listed that the call's key may use.
    """
    adapters, tenant = service.frontend.adapters, tenant_of(request)
    cards = [_base_card(service, name) for name in adapters.base_names if tenant.may_use_base]
    cards += [_adapter_card(service, card) for card in adapter_access.visible(request, adapters.cards())]
    return as_json({"object": "list", "data": cards})


async def retrieve_model(service: Service, request: web.Request) -> web.StreamResponse:
    """Returns one entry of `/v1/models`; the id may contain slashes and colons.

    Raises NotFound for an unknown id, and for a model that the call's key may not use.
    """
    name = request.match_info["id"]
    adapters, tenant = service.frontend.adapters, tenant_of(request)
    meant = adapters.meaning(name)
    if meant is None and tenant.may_use_base:
        return as_json(_base_card(service, name))
    card = adapters.card(meant) if meant is not None and tenant.may_use(meant) else None
    if card is not None:
        return as_json(_adapter_card(service, card))
    raise NotFound(f"the model '{name}' does not exist", param="model", code="model_not_found")


async def model_info(service: Service, request: web.Request) -> web.StreamResponse:
    """Returns the base model's paths and architecture in SGLang's shape."""
    config, model = service.config, _json_file(service.config.model_path, "config.json")
    return as_json(
        {
            "model_path": config.model_path,
            "tokenizer_path": config.tokenizer_path,
            "served_model_name": config.served_model_names[0],
            "is_generation": True,
            "preferred_sampling_params": None,
            "weight_version": "default",
            "has_image_understanding": False,
            "has_audio_understanding": False,
            "model_type": model.get("model_type"),
            "architectures": model.get("architectures"),
        }
    )


async def tokenizer_info(service: Service, request: web.Request) -> web.StreamResponse:
    """Returns the base's tokenizer_config.json with the chat template that is served, as vLLM does."""
    found = _json_file(service.config.tokenizer_path, "tokenizer_config.json")
    return as_json(found | {"chat_template": service.frontend.text_tools_for(None).chat.source})


@functools.lru_cache(maxsize=4)
def _json_file(directory: str, name: str) -> dict[str, Any]:
    """Returns the content of a JSON file of the base model, empty if there is no such file or it is no object."""
    with files.open_directory(directory) as opened:
        raw = None if opened is None else files.read(opened, name, files.MAX_CONFIG)
    try:
        return {} if raw is None else msgspec.json.decode(raw, type=dict[str, Any])
    except msgspec.MsgspecError:
        return {}


def _card(name: str, created: int, root: str, parent: str | None, max_length: int | None) -> dict[str, object]:
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": OWNER,
        "root": root,
        "parent": parent,
        "max_model_len": max_length,
        "permission": [_permission(name, created)],
    }


def _permission(name: str, created: int) -> dict[str, object]:
    """Returns a permission object in OpenAI's former format, which some clients still read."""
    return {
        "id": f"modelperm-{name}",
        "object": "model_permission",
        "created": created,
        "allow_create_engine": False,
        "allow_sampling": True,
        "allow_logprobs": True,
        "allow_search_indices": False,
        "allow_view": True,
        "allow_fine_tuning": False,
        "organization": "*",
        "group": None,
        "is_blocking": False,
    }


def _max_length(service: Service) -> int | None:
    return service.frontend.max_length or None


def _vocab_size(service: Service) -> int | None:
    capacity = service.frontend.capacity
    return None if capacity is None else capacity.vocab_size


def _base_card(service: Service, name: str) -> dict[str, object]:
    return _card(name, service.started, service.config.model_path, None, _max_length(service))


def _adapter_card(service: Service, card: AdapterCard) -> dict[str, object]:
    created = card.created or service.started
    return _card(card.name, created, card.root, card.parent, _max_length(service)) | {
        "revision": card.revision,
        "lora_rank": card.lora_rank,
        "state": card.state,
        "pinned": card.pinned,
        "adapter_id": card.adapter_id,
        "lora_int_id": card.adapter_id,
        "target_modules": card.target_modules,
        "bytes": card.bytes,
        "running": card.running,
        "vocab_size": card.vocab_size or _vocab_size(service),
        "brings": card.brings,
        "alora_invocation_tokens": card.invocation or None,
        "notes": card.notes,
    }
