"""Server-sent events: what is written into a stream whose client has closed its side."""

from __future__ import annotations

import asyncio
from unittest.mock import AsyncMock, Mock

from tokenizer_proc.http import sse
from tokenizer_proc.http.intake.connection import Connection


def test_no_comment_follows_the_end_of_a_stream() -> None:
    async def scenario() -> None:
        connection, answer = Mock(spec=Connection), AsyncMock()
        with sse._commented(Mock(protocol=connection), answer):
            connection.on_half_close()
            await asyncio.sleep(0)
            assert answer.write.await_count == 1
            connection.on_half_close()
        await asyncio.sleep(0)
        assert answer.write.await_count == 1
        assert connection.on_half_close is None

    asyncio.run(scenario())
