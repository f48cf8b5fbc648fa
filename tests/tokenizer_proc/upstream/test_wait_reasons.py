"""Wait reasons, by themselves and in the front end's refusals and time-outs."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import get_args

import pytest
from fixtures.serving.tokenizer_front import Fake, capacity

from engine.errors import EngineError, Overloaded, TimedOut
from engine.messages import SamplingParams, Stats, Submit, Update, WaitingRequest, WaitReason
from tokenizer_proc.upstream.wait_reasons import RequestWait, WaitReasons

SQL, POET = [(1, 1.0)], [(2, 1.0)]


def stats(*listed: WaitingRequest, waiting: int | None = None, running: dict[int, int] | None = None) -> Stats:
    return Stats(
        waiting=len(listed) if waiting is None else waiting,
        running_adapters=running or {},
        oldest_waiting=list(listed),
    )


def waits_of(told: Stats, loras: dict[int, list[tuple[int, float]]] | None = None) -> WaitReasons:
    waits = WaitReasons()
    waits.update(told, 9, loras or {})
    return waits


def test_a_listed_request_waits_for_its_reason() -> None:
    waits = waits_of(stats(WaitingRequest(3, 7.5, "lanes", 2)))
    assert waits.find(3, 2, SQL) == RequestWait("lanes", 7.5)
    assert waits.find(3, 4, SQL) is None, "it has run since"
    assert waits.find(4, 0, SQL) is None, "all waiting requests are listed"
    waits.forget()
    assert waits.find(3, 2, SQL) is None


def test_a_newer_request_waits_as_its_adapters_listed_ones() -> None:
    listed = [WaitingRequest(3, 7.5, "lanes"), WaitingRequest(5, 6.0, "load"), WaitingRequest(6, 5.0, "rows")]
    loras = {3: SQL, 5: POET, 6: []}
    waits = waits_of(stats(*listed, waiting=9, running={2: 1}), loras)
    assert waits.find(8, 0, SQL) == RequestWait("lanes", None)
    assert waits.find(4, 0, SQL) is None, "an older request would be listed if it waited"
    assert waits.find(8, 1, SQL) is None, "it has run"
    assert waits.find(8, 0, POET) is None, "its adapter runs, so the request may run too"
    assert waits.find(8, 0, []) is None, "for the base it is not known"
    assert waits.find(8, 0, [(3, 1.0)]) is None
    assert waits.find(10, 0, SQL) is None, "it was sent after the Stats"
    loras[5] = SQL
    assert waits_of(stats(*listed, waiting=9), loras).find(8, 0, SQL) is None, "the listed requests disagree"


def test_every_reason_has_words() -> None:
    waits = WaitReasons()
    waits.capacity = capacity(300, max_loras=3)
    assert waits.describe("lanes") == "a lane: no more adapters run at a time (--max-loras-per-batch: 3)"
    assert waits.describe("rows") == "a row: no more requests run at a time (--max-running-requests: 8)"
    assert waits.describe("pages").startswith("KV pages: the KV cache holds 1600 tokens (--max-total-tokens")
    assert not any(mark in waits.describe(reason) for reason in get_args(WaitReason) for mark in "{}?")


def run(work: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        await asyncio.wait_for(work(), 10)

    asyncio.run(main())


def submit(lora: str | None = None, n: int = 1) -> Submit:
    return Submit(id=1, prompt="hello", params=SamplingParams(n=n), lora=lora)


async def refusal(fake: Fake) -> EngineError:
    with pytest.raises(Overloaded) as raised:
        async with fake.front.open(submit()):
            pass
    return raised.value


def test_a_full_queue_says_what_open_requests_wait_for() -> None:
    fake = Fake("sql", max_open_requests=1)

    async def work() -> None:
        async with fake.front.open(submit()):
            bound = "1 requests are open already, which is the bound (--max-open-requests)"
            assert (await refusal(fake)).message == f"{bound}: try again soon"
            fake.front.handle(Stats(waiting=4, waiting_reasons={"load": 1, "rows": 3}))
            cause = "No more requests run at a time (--max-running-requests: 8)"
            found = "3 wait for a row, 1 waits for an adapter to be read"
            assert (await refusal(fake)).message == f"{bound}: {found}. {cause}. Try again soon"

    run(work)


@pytest.mark.parametrize(
    ("generated", "listed", "told"),
    [
        (0, None, "No token had been generated"),
        (3, None, "3 tokens had been generated"),
        (1, 0, "1 token had been generated"),
        (
            0,
            0,
            "No token had been generated. It still waited, after 7.5 s in the queue, for rank pages: "
            "adapters that run or come first use the pool (--lora-pool-size)",
        ),
        (
            2,
            2,
            "2 tokens had been generated. It still waited, after 7.5 s in the queue, for rank pages: "
            "adapters that run or come first use the pool (--lora-pool-size)",
        ),
    ],
)
def test_a_late_request_says_how_far_it_came(generated: int, listed: int | None, told: str) -> None:
    fake = Fake("sql", request_timeout=0.05)

    async def work() -> None:
        async with fake.front.open(submit("sql")) as stream:
            number = fake.generates[0].request_id
            if listed is not None:
                fake.front.handle(stats(WaitingRequest(number, 7.5, "rank_pages", listed)))
            if generated:
                fake.say(Update(request_id=number, index=0, tokens=[300] * generated))
            with pytest.raises(TimedOut) as raised:
                async for _ in stream:
                    pass
        bound = "the request was not done after 0.05 seconds (--request-timeout), and is ended"
        assert raised.value.message == f"{bound}. {told}"

    run(work)


def test_requests_that_time_out_together_all_say_why() -> None:
    """The listed request ends first; the errors of its adapter's other requests still name what they waited for."""
    fake = Fake("sql", request_timeout=0.05)

    async def work() -> None:
        async with fake.front.open(submit("sql", n=2)) as first, fake.front.open(submit("sql")) as second:
            number = fake.generates[0].request_id
            fake.front.handle(stats(WaitingRequest(number, 7.5, "lanes"), waiting=3))
            for stream in (first, second):
                with pytest.raises(TimedOut, match="for a lane: no more adapters run at a time"):
                    async for _ in stream:
                        pass

    run(work)


def test_the_choice_that_waited_longest_says_why() -> None:
    fake = Fake("sql", request_timeout=0.05)

    async def work() -> None:
        async with fake.front.open(submit("sql", n=3)) as stream:
            first, second, third = (message.request_id for message in fake.generates)
            listed = [WaitingRequest(second, 3.0, "pages", 0), WaitingRequest(third, 4.0, "rows", 0)]
            fake.say(Update(request_id=first, index=0, tokens=[300] * 5))
            fake.front.handle(stats(*listed))
            with pytest.raises(TimedOut, match=r"5 tokens had been generated. It still waited, after 4.0 s .* a row: "):
                async for _ in stream:
                    pass

    run(work)


def test_a_new_schedulers_wait_reasons_start_empty() -> None:
    fake = Fake("sql")

    async def work() -> None:
        async with fake.front.open(submit("sql")):
            number = fake.generates[0].request_id
            fake.front.handle(stats(WaitingRequest(number, 7.5, "lanes")))
            (waiting,) = fake.front.info()["long_waiting"]
            assert (waiting["request_id"], waiting["adapters"], waiting["reason"]) == (number, ["sql"], "lanes")
            assert waiting["seconds"] >= 7.5
            fake.front.recover(1)
            assert fake.front.info()["long_waiting"] == []
            fake.front.handle(stats(WaitingRequest(number, 0.0, "load")))
            assert fake.front.info()["long_waiting"] == [], "it has not waited long"
        fake.front.handle(stats(WaitingRequest(number, 7.5, "lanes")))
        assert fake.front.info()["long_waiting"] == [], "it is not open any more"

    run(work)
