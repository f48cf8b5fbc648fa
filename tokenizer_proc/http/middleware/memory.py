"""The memory account of each request, which is freed when its answer has been read."""

from __future__ import annotations

from aiohttp import web
from aiohttp.typedefs import Handler

from tokenizer_proc.http.intake.body_reader import ACCOUNT, INTAKE
from tokenizer_proc.http.intake.connection_limits import network
from tokenizer_proc.http.intake.memory_budget import MemoryAccount


@web.middleware
async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Opens an account that counts for the client's network."""
    account = request[ACCOUNT] = MemoryAccount(request.app[INTAKE].budget, f"address {network(request.remote)}")
    try:
        return await handler(request)
    finally:
        account.close()
