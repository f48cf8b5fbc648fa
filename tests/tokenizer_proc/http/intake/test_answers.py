"""The memory of answers counts for the request until they have been read; without any left the call ends."""

from __future__ import annotations

import asyncio
import json

import pytest
from fixtures.connections.raw_http import call, served, until
from fixtures.serving.fake_frontend import FakeFrontend

from tokenizer_proc.http.intake.body_reader import INTAKE
from tokenizer_proc.http.intake.memory_budget import MemoryBudget

SCORED = {"prompt": [1] * 300, "echo": True, "logprobs": 20, "max_tokens": 100}
MEMORY = 300 * 21 * 300
"""The least memory that is counted for the answer."""


def front() -> FakeFrontend:
    made = FakeFrontend()
    made.reply = "x" * 99
    return made


def budget_of(server: object) -> MemoryBudget:
    budget: MemoryBudget = server.server._runner.app[INTAKE].budget  # type: ignore[attr-defined]
    return budget


def test_an_answer_counts_while_it_is_made() -> None:
    async def main() -> None:
        frontend = front()
        frontend.hold_after = 90
        async with served(frontend) as server:
            client = await server.connect()
            await client.send(call("/v1/completions", SCORED))
            await until(lambda: budget_of(server).used > MEMORY)
            await client.close()
            await until(lambda: budget_of(server).used == 0)

    asyncio.run(main())


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_without_memory_ends_with_an_error(stream: bool) -> None:
    async def main() -> None:
        frontend = front()
        async with served(frontend, max_request_memory=MEMORY) as server:
            client = await server.connect()
            await client.send(call("/v1/completions", SCORED | {"stream": stream}, "Connection: close"))
            answer = await client.answer()
            assert frontend.left == 1
            if stream:
                assert b"data: [DONE]" not in answer.body
                assert (
                    "max-request-memory"
                    in json.loads(answer.body.split(b"data: ")[-1].split(b"\n")[0])["error"]["message"]
                )
            else:
                assert (answer.status, "max-request-memory" in answer.message) == (413, True)
            await until(lambda: budget_of(server).used == 0)

    asyncio.run(main())


def test_answers_of_several_calls_share_the_memory() -> None:
    async def main() -> None:
        frontend = front()
        frontend.hold_after = 95
        async with served(frontend, max_request_memory=4 * MEMORY) as server:
            clients = [await server.connect() for _ in range(5)]
            for client in clients:
                await client.send(call("/v1/completions", SCORED))
            answers = [asyncio.ensure_future(client.answer()) for client in clients]
            await until(lambda: any(answer.done() for answer in answers))
            answer = next(answer for answer in answers if answer.done()).result()
            assert (answer.status, answer.headers["retry-after"]) == (503, "1")
            assert budget_of(server).used <= budget_of(server).most
            for one in answers:
                one.cancel()
            await asyncio.gather(*answers, return_exceptions=True)

    asyncio.run(main())
