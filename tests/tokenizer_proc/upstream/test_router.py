"""Open requests: their bounds, updates from other incarnations, and schedulers that take over."""

from __future__ import annotations

import msgspec
import pytest
from fixtures.serving.streams import rest, run, submit, text_of
from fixtures.serving.tokenizer_front import END, ENDPOINTS, Fake

from engine.errors import EngineError, InternalError, Overloaded
from engine.messages import Generate, Progress, Update


def test_updates_for_an_older_incarnation_are_dropped() -> None:
    endpoints = msgspec.structs.replace(ENDPOINTS, epoch=3)
    fake = Fake(endpoints=endpoints)

    async def work() -> None:
        async with fake.front.open(submit()) as stream:
            [generate] = fake.generates
            assert generate.epoch == 3
            assert generate.request_id > Fake(endpoints=ENDPOINTS).front.router.start(
                print, [], prompt=[1], lora=[], sampling=generate.sampling, stopping=generate.stopping
            )
            update = Update(request_id=generate.request_id, index=0, tokens=[300], finish="length")
            fake.front.handle(Progress(2, [update]))
            fake.front.handle(Progress(3, [update]))
            [delta] = await rest(stream)
            assert delta.token_ids == [300]

    run(work)


def test_a_request_that_grew_larger_than_a_frame_fails_alone() -> None:
    """Another scheduler takes over, and the router sends it the tokens of each request."""
    fake = Fake()

    def refuse_large(message: msgspec.Struct) -> None:
        if isinstance(message, Generate) and len(message.generated) > 1:
            raise InternalError("a Generate of 9 bytes exceeds the frame bound")

    async def work() -> None:
        async with fake.front.open(submit([5], n=2, seed=1)) as large, fake.front.open(submit([6])) as small:
            ids = [each.request_id for each in fake.generates]
            fake.say(Update(request_id=ids[0], index=0, tokens=[7, 8]))
            fake.before_send = refuse_large
            fake.sent.clear()
            fake.front.recover(1)
            assert [each.request_id for each in fake.generates] == [ids[2]]
            fake.front.handle(Progress(0, [Update(request_id=ids[2], index=0, tokens=[7], finish="length")], 1))
            assert (await rest(small))[-1].finish_reason == "length"
            with pytest.raises(InternalError, match="frame bound"):
                await rest(large)

    run(work)


def test_open_requests_are_bounded() -> None:
    fake = Fake(max_open_requests=3)

    async def work() -> None:
        async with fake.front.open(submit(n=3)):
            with pytest.raises(Overloaded):
                await fake.front.open(submit()).__aenter__()
        with pytest.raises(Overloaded):
            await fake.front.open(submit(n=4)).__aenter__()
        async with fake.front.open(submit(n=3)):
            pass

    run(work)


def test_a_fault_in_one_stream_ends_that_stream_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake()

    async def work() -> None:
        async with fake.front.open(submit()) as bad, fake.front.open(submit()) as good:
            one, two = fake.generates
            broken = [2**70]
            fake.say(
                Update(request_id=one.request_id, index=0, tokens=broken),
                Update(request_id=two.request_id, index=0, tokens=fake.ids("fine"), finish="length"),
                Update(request_id=999, index=0, tokens=[1]),
            )
            assert text_of(await rest(good)) == "fine"
            with pytest.raises(EngineError):
                await anext(bad)
        assert fake.aborted == [one.request_id]

    run(work)


def test_prompt_tokens_are_bounded_but_the_first_prompt_fits() -> None:
    fake = Fake(max_queued_tokens=5)

    async def work() -> None:
        async with fake.front.open(submit([5] * 9)):
            with pytest.raises(Overloaded, match="prompt tokens"):
                async with fake.front.open(submit([5])):
                    pass
        async with fake.front.open(submit([5, 6])), fake.front.open(submit([5, 6, 7])):
            assert fake.front.router.open == 2

    run(work)


def test_another_scheduler_is_told_of_every_open_request() -> None:
    fake = Fake()

    async def work() -> None:
        async with fake.front.open(submit("hello", max_tokens=9)) as stream, fake.front.open(submit("gone")) as ended:
            [generate, other] = fake.generates
            at = fake.say_text(generate.request_id, " wörld")
            fake.say(Update(request_id=other.request_id, index=0, tokens=[END], finish="stop", stop_reason=END))
            await rest(ended)
            fake.sent.clear()
            fake.front.recover(1)
            [again] = fake.generates
            told = fake.ids(" wörld")
            assert msgspec.structs.replace(again, generated=[]) == generate
            assert again.generated == told
            assert len(told) == at
            late = Update(request_id=generate.request_id, index=at, tokens=[300])
            fake.front.handle(Progress(0, [late], 0))  # a late message of the former scheduler
            update = Update(request_id=generate.request_id, index=at, tokens=[END], finish="stop", stop_reason=END)
            fake.front.handle(Progress(0, [update], 1))
            deltas = await rest(stream)
            assert [token for delta in deltas for token in delta.token_ids] == [*told, END]

    run(work)
