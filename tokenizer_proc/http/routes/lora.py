"""The routes that load, unload and pin adapters, in SGLang's dialect and in vLLM's.

    POST /load_lora_adapter, /unload_lora_adapter           {"success", "error_message", "loaded_adapters"}, 200 or 400
    POST /pin_lora_adapter, /unpin_lora_adapter             this server's own routes, with the same response
    POST /v1/load_lora_adapter, /v1/unload_lora_adapter     a sentence, or the error object

Only bodies and responses are handled here; the front end's `Lifecycle` does the work.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from http import HTTPStatus

import msgspec
from aiohttp import web

from engine.errors import EngineError, InvalidRequest, NotFound
from engine.messages import AdapterStage
from tokenizer_proc.adapters.lifecycle import LoadRequest
from tokenizer_proc.http.bodies import decoding
from tokenizer_proc.http.bodies.fields import IGNORED_BY_ROUTE
from tokenizer_proc.http.encoding import as_json
from tokenizer_proc.http.middleware import errors
from tokenizer_proc.http.service import Service


class LoadBody(msgspec.Struct, frozen=True, kw_only=True):
    """SGLang's body, with this server's own field `preload`: respond only when the adapter is resident."""

    lora_name: str
    lora_path: str
    pinned: bool = False
    preload: bool = False


class NameBody(msgspec.Struct, frozen=True, kw_only=True):
    """A body that names an adapter."""

    lora_name: str


class V1LoadBody(msgspec.Struct, frozen=True, kw_only=True):
    """vLLM's body for a load, with this server's own field `preload`."""

    lora_name: str
    lora_path: str
    load_inplace: bool = False
    is_3d_lora_weight: bool = False
    preload: bool = False


class V1UnloadBody(msgspec.Struct, frozen=True, kw_only=True):
    """vLLM's body for an unload."""

    lora_name: str
    lora_int_id: int | None = None


async def load(service: Service, request: web.Request) -> web.StreamResponse:
    """Loads an adapter; responds when requests can name it, or with `"preload": true` when it is resident.

    If a preload takes longer than a minute, the response has the adapter's state.
    """

    async def work(fields: decoding.Fields) -> AdapterStage | None:
        body = decoding.decode(fields, LoadBody)
        ask = LoadRequest(name=body.lora_name, path=body.lora_path, pinned=body.pinned, preload=body.preload)
        entry = await service.frontend.lifecycle.load(ask)
        return entry.stage if body.preload and entry.stage != "resident" else None

    return await _native(service, request, work)


async def unload(service: Service, request: web.Request) -> web.StreamResponse:
    """Unloads an adapter; responds when its memory is free, or after a minute with `"state": "draining"`."""

    async def work(fields: decoding.Fields) -> AdapterStage | None:
        lifecycle = service.frontend.lifecycle
        entry = await lifecycle.unload(decoding.decode(fields, NameBody).lora_name)
        return None if await lifecycle.freed(entry) else entry.stage

    return await _native(service, request, work)


async def pin(service: Service, request: web.Request) -> web.StreamResponse:
    """Pins an adapter, which keeps it from being evicted; at most `--max-loras-per-batch` - 1 can be pinned."""
    return await _pinned(service, request, True)


async def unpin(service: Service, request: web.Request) -> web.StreamResponse:
    """Unpins an adapter, which can then be evicted again."""
    return await _pinned(service, request, False)


async def load_from_tensors(service: Service, request: web.Request) -> web.StreamResponse:
    """Refuses SGLang's load of tensors in the body: save the adapter as a directory and load that."""

    async def work(fields: decoding.Fields) -> AdapterStage | None:
        raise InvalidRequest(
            "adapters are not taken as tensors: save the adapter as a directory and name it in /load_lora_adapter",
            code="not_available",
        )

    return await _native(service, request, work)


async def v1_load(service: Service, request: web.Request) -> web.StreamResponse:
    """Loads an adapter as vLLM does, with `load_inplace`; responds with vLLM's sentence when requests can name it."""
    body = decoding.decode(await decoding.read(request), V1LoadBody)
    if body.is_3d_lora_weight:
        raise InvalidRequest("'is_3d_lora_weight' is not supported here, other than False", param="is_3d_lora_weight")
    ask = LoadRequest(name=body.lora_name, path=body.lora_path, load_inplace=body.load_inplace, preload=body.preload)
    await service.frontend.lifecycle.load(ask)
    return web.Response(text=f"Success: LoRA adapter '{body.lora_name}' added successfully.")


async def v1_unload(service: Service, request: web.Request) -> web.StreamResponse:
    """Unloads an adapter as vLLM does; responds at once, and memory is freed when its last request has finished."""
    body = decoding.decode(await decoding.read(request), V1UnloadBody)
    if not body.lora_name:
        raise InvalidRequest("'lora_name' needs to be provided to unload a LoRA adapter.", param="lora_name")
    await service.frontend.lifecycle.unload(body.lora_name, body.lora_int_id)
    return web.Response(text=f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


async def _pinned(service: Service, request: web.Request, pinned: bool) -> web.StreamResponse:
    async def work(fields: decoding.Fields) -> AdapterStage | None:
        await service.frontend.lifecycle.pin(decoding.decode(fields, NameBody).lora_name, pinned)
        return None

    return await _native(service, request, work)


async def _native(
    service: Service, request: web.Request, work: Callable[[decoding.Fields], Awaitable[AdapterStage | None]]
) -> web.StreamResponse:
    """Runs `work` with the body's fields, and returns its result as a response in SGLang's format.

    `work` returns the adapter's state if the response must show it, else None.
    """
    ignored = IGNORED_BY_ROUTE.get(request.path, frozenset())
    try:
        fields = await decoding.read(request)
        stage = await work({name: value for name, value in fields.items() if name not in ignored})
    except EngineError as error:
        return _failure(service, error)
    state = {} if stage is None else {"state": stage}
    return as_json({"success": True, "error_message": "", "loaded_adapters": _loaded(service)} | state)


def _failure(service: Service, error: EngineError) -> web.Response:
    """Returns the error response, with the fields of SGLang's and of OpenAI's format. NotFound has status 400 here."""
    shown = {"success": False, "error_message": error.message, "loaded_adapters": _loaded(service)}
    answer = errors.response(error, status=HTTPStatus.BAD_REQUEST if isinstance(error, NotFound) else None)
    answer.body = msgspec.json.encode(shown | errors.body(error))
    return answer


def _loaded(service: Service) -> dict[str, str]:
    return service.frontend.adapters.paths()
