"""The memory account of a request counts for the network of its client."""

from __future__ import annotations

import asyncio
from unittest.mock import Mock

from aiohttp import web
from aiohttp.test_utils import make_mocked_request

from tokenizer_proc.http.intake.body_reader import ACCOUNT, INTAKE, RAW, Intake
from tokenizer_proc.http.intake.memory_budget import MemoryBudget
from tokenizer_proc.http.middleware import memory


def test_the_addresses_of_one_network_are_one_owner() -> None:
    async def scenario() -> None:
        budget, app, held = MemoryBudget(900), web.Application(), []
        app[INTAKE] = Intake(budget, 1, 1.0)

        async def handler(request: web.Request) -> web.StreamResponse:
            request[ACCOUNT].add(RAW, 100)
            held.append(dict(budget._by_owner))
            return web.Response()

        for address in ("2001:db8::1", "2001:db8::2", "2001:db8:0:1::1", "10.0.0.1"):
            transport = Mock()
            transport.get_extra_info.side_effect = {"peername": (address, 1)}.get
            await memory.middleware(make_mocked_request("POST", "/", app=app, transport=transport), handler)
        assert [len(owners) for owners in held] == [1] * 4
        first, second, third, fourth = (next(iter(owners)) for owners in held)
        assert first == second
        assert len({first, third, fourth}) == 3
        assert not budget._by_owner

    asyncio.run(scenario())
