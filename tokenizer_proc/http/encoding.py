"""JSON responses. A large one is encoded in a thread and in slices, so that it does not stall the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec
from aiohttp import web

SLICE = 256  # the number of list elements that are encoded at once, during which the GIL is held


def as_json(value: object) -> web.Response:
    """Returns a response with status 200 and `value` encoded as JSON."""
    return json_response(msgspec.json.encode(value))


def json_response(body: bytes) -> web.Response:
    """Returns a response with status 200 and `body`, which is encoded JSON."""
    return web.Response(body=body, content_type="application/json")


async def encoded(make: Callable[[], object], is_large: bool) -> bytes:
    """Returns the result of `make` encoded as JSON.

    With `is_large`, making or encoding it may take long, so both are done in a thread.
    """
    if not is_large:
        return msgspec.json.encode(make())
    return await asyncio.to_thread(lambda: in_slices(make()))


def in_slices(value: object) -> bytes:
    """Encodes `value` to the same bytes as msgspec, in slices, between which other threads can take the GIL."""
    if isinstance(value, dict):
        members = (msgspec.json.encode(str(name)) + b":" + in_slices(member) for name, member in value.items())
        return b"{" + b",".join(members) + b"}"
    if isinstance(value, list) and len(value) > SLICE:
        parts = (msgspec.json.encode(value[at : at + SLICE])[1:-1] for at in range(0, len(value), SLICE))
        return b"[" + b",".join(parts) + b"]"
    if isinstance(value, list) and any(isinstance(each, dict | list) for each in value):
        return b"[" + b",".join(map(in_slices, value)) + b"]"
    return msgspec.json.encode(value)
