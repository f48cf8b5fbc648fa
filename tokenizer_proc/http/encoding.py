"""JSON of answers that may be large. Made in a thread and in slices: the streams of the event loop go on meanwhile.

Knows no dialect.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec

SLICE = 256  # elements of a list that are encoded at once, as nothing else runs in this process for so long


async def encoded(make: Callable[[], object], is_large: bool) -> bytes:
    """What `make` returns, as JSON; `is_large` says whether making or encoding it may take long."""
    if not is_large:
        return msgspec.json.encode(make())
    return await asyncio.to_thread(lambda: in_slices(make()))


def in_slices(value: object) -> bytes:
    """The same bytes as msgspec's, with the interpreter's lock let go of every now and then."""
    if isinstance(value, dict):
        members = (msgspec.json.encode(str(name)) + b":" + in_slices(member) for name, member in value.items())
        return b"{" + b",".join(members) + b"}"
    if isinstance(value, list) and len(value) > SLICE:
        parts = (msgspec.json.encode(value[at : at + SLICE])[1:-1] for at in range(0, len(value), SLICE))
        return b"[" + b",".join(parts) + b"]"
    if isinstance(value, list) and any(isinstance(each, dict | list) for each in value):
        return b"[" + b",".join(map(in_slices, value)) + b"]"
    return msgspec.json.encode(value)
