"""JSON responses. A large one is encoded in a thread and in slices, so that it does not stall the event loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import msgspec
from aiohttp import web

from tokenizer_proc.work.queue import Job, WorkQueue

LARGE_IDS = 8192  # the number of token ids above which a body takes long to encode
SLICE = 256  # the number of list elements that are encoded at once, during which the GIL is held


def as_json(value: object) -> web.Response:
    """Returns a response with status 200 and `value` encoded as JSON."""
    return json_response(msgspec.json.encode(value))


def json_response(body: bytes) -> web.Response:
    """Returns a response with status 200 and `body`, which is encoded JSON."""
    return web.Response(body=body, content_type="application/json")


async def encoded(queue: WorkQueue, tenant: str, make: Callable[[], object], is_large: bool) -> bytes:
    """Returns the result of `make` encoded as JSON.

    With `is_large`, making or encoding it may take long, so both are done in a thread of `queue`, in slices, and are
    given up if the caller leaves.
    """
    if not is_large:
        return msgspec.json.encode(make())

    def work(job: Job) -> bytes:
        return in_slices(make(), job.check)

    return await queue.run(tenant, work)


def in_slices(value: object, check: Callable[[], None] = lambda: None) -> bytes:
    """Encodes `value` to the same bytes as msgspec, in slices, between which other threads can take the GIL.

    `check` is called before each slice, and may raise.
    """
    return b"".join(_slices(value, check))


def _slices(value: object, check: Callable[[], None]) -> Iterator[bytes]:
    if isinstance(value, dict):
        yield b"{"
        for place, (name, member) in enumerate(value.items()):
            yield (b"," if place else b"") + msgspec.json.encode(str(name)) + b":"
            yield from _slices(member, check)
        yield b"}"
    elif isinstance(value, list) and len(value) > SLICE:
        array = JsonArray()
        for at in range(0, len(value), SLICE):
            check()
            array.add(value[at : at + SLICE])
        yield from array.parts()
    elif isinstance(value, list) and any(isinstance(each, dict | list) for each in value):
        yield b"["
        for place, each in enumerate(value):
            yield b"," if place else b""
            yield from _slices(each, check)
        yield b"]"
    elif isinstance(value, msgspec.Raw):
        yield bytes(value)
    else:
        yield msgspec.json.encode(value)


class JsonArray:
    """A JSON array in the making: its elements are encoded when they are added, and are not kept as objects."""

    def __init__(self) -> None:
        self._slices: list[bytes] = []

    def add(self, values: Sequence[object]) -> None:
        """Encodes and appends `values`."""
        if values:
            self._slices.append(msgspec.json.encode(values)[1:-1])

    def add_array(self, other: JsonArray) -> None:
        """Appends the elements of `other`."""
        self._slices += other._slices

    def parts(self) -> Iterator[bytes]:
        """Yields the array in parts."""
        yield b"["
        for place, each in enumerate(self._slices):
            if place:
                yield b","
            yield each
        yield b"]"

    def raw(self) -> msgspec.Raw:
        """Returns the whole array, to be put into a value that is encoded as JSON."""
        joined = b",".join(self._slices)
        self._slices = [joined] if self._slices else []
        return msgspec.Raw(b"[%b]" % joined)
