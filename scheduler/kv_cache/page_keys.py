"""The keys by which the radix tree finds full pages: the bytes of a page's tokens."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence

from scheduler.requests.request import Request
from scheduler.types import Namespace

KEYS_AT_ONCE = 32


def page_keys(tokens: Sequence[int], size: int, begin: int, end: int) -> Iterator[bytes]:
    """Yields the keys of pages `begin` to `end` - 1 of these tokens; a page holds `size` tokens."""
    width = array("I").itemsize * size
    for first in range(begin, end, KEYS_AT_ONCE):
        data = array("I", tokens[first * size : min(end, first + KEYS_AT_ONCE) * size]).tobytes()
        for at in range(0, len(data), width):
            yield data[at : at + width]


def request_page_keys(request: Request, alora: Namespace | None, size: int, begin: int, end: int) -> Iterator[bytes]:
    """Yields the keys of a request's pages `begin` to `end` - 1; without `alora`, only those before its invocation."""
    keys = page_keys(request.tokens, size, begin, end)
    if request.invocation_start is None:
        yield from keys
        return
    first, offset = divmod(request.invocation_start, size)
    for index, key in enumerate(keys, begin):
        if index != first:
            yield key
        elif alora is not None:
            yield alora.first_key(key, offset)
        else:
            return
