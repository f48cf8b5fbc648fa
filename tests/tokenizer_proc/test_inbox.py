"""The task that reads the scheduler's messages leaves time for the other tasks of the event loop."""

from __future__ import annotations

import asyncio
from typing import Any

from fixtures.serving.tokenizer_front import Fake

from engine.messages import Progress, Update
from tokenizer_proc.inbox import SchedulerInbox


class FullInbox:
    """An inbox with many messages, so that the reader never waits."""

    def __init__(self, count: int) -> None:
        self.left = count

    def __aiter__(self) -> FullInbox:
        return self

    async def __anext__(self) -> Progress:
        if not self.left:
            await asyncio.get_running_loop().create_future()
        self.left -= 1
        return Progress(0, [Update(request_id=9, index=0)])


def test_the_event_loop_turns_between_queued_messages() -> None:
    async def work() -> list[int]:
        inbox: Any = FullInbox(5)
        outbox: Any = None
        reading = asyncio.ensure_future(SchedulerInbox(Fake().front, outbox, inbox).read())
        seen = [inbox.left]
        while inbox.left:
            await asyncio.sleep(0)
            seen.append(inbox.left)
        reading.cancel()
        return seen

    assert asyncio.run(work()) == [5, 4, 3, 2, 1, 0]
