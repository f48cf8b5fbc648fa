"""JSON answers. A large one is encoded in a thread and in slices, so that it does not stall the event loop's streams.

Knows no dialect.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec
from aiohttp import web

SLICE = 256  # elements of a list that are encoded at once; the interpreter's lock is held for so long


def as_json(value: object) -> web.Response:
    """A 200 with `value` as JSON."""
    return json_response(msgspec.json.encode(value))


def json_response(body: bytes) -> web.Response:
    """A 200 with a body that is JSON."""
    return web.Response(body=body, content_type="application/json")


async def encoded(make: Callable[[], object], is_large: bool) -> bytes:
    """The JSON of what `make` returns. `is_large`: making or encoding it may take long."""
    if not is_large:
        return msgspec.json.encode(make())
    return await asyncio.to_thread(lambda: in_slices(make()))


def in_slices(value: object) -> bytes:
    """The bytes that msgspec makes of `value`; between slices other threads can take the interpreter's lock."""
    if isinstance(value, dict):
        members = (msgspec.json.encode(str(name)) + b":" + in_slices(member) for name, member in value.items())
        return b"{" + b",".join(members) + b"}"
    if isinstance(value, list) and len(value) > SLICE:
        parts = (msgspec.json.encode(value[at : at + SLICE])[1:-1] for at in range(0, len(value), SLICE))
        return b"[" + b",".join(parts) + b"]"
    if isinstance(value, list) and any(isinstance(each, dict | list) for each in value):
        return b"[" + b",".join(map(in_slices, value)) + b"]"
    return msgspec.json.encode(value)
