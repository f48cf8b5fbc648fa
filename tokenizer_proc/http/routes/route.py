"""A route of the application: what it is called by, what it needs, and what its body is."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import NamedTuple

import msgspec
from aiohttp import web

from tokenizer_proc.http.auth.rights import Rights
from tokenizer_proc.http.service import Service


class Route(NamedTuple):
    """A route: its method and path, the rights that it needs, and its handler.

    `body` is the struct of its body. `spellings` are the names of sampling parameters that the body may have beside it.
    """

    method: str
    path: str
    rights: Rights
    handler: Callable[[Service, web.Request], Awaitable[web.StreamResponse]]
    body: type[msgspec.Struct] | None = None
    spellings: Mapping[str, str] = {}
