"""Streams of a front end; the test plays its scheduler: text, stop strings, choices, early ends."""

from __future__ import annotations

import asyncio

import pytest
from fixtures.serving.streams import rest, run, submit, text_of
from fixtures.serving.tokenizer_front import END, Fake, scores

from engine.errors import InternalError, InvalidRequest, TimedOut
from engine.messages import ChatMessage, SamplingParams, Submit, Update


def test_a_request_from_text_to_text() -> None:
    fake = Fake()

    async def work() -> None:
        async with fake.front.open(submit("hello", max_tokens=20, temperature=0.0)) as stream:
            [generate] = fake.generates
            assert generate.prompt == stream.prompt_ids == fake.front.tokenizer.encode("hello")
            assert generate.lora == []
            assert generate.stopping.end_ids == [END]
            at = fake.say_text(generate.request_id, " wörld", cached_tokens=2)
            fake.say(Update(request_id=generate.request_id, index=at, tokens=[END], finish="stop", stop_reason=END))
            first, last = await rest(stream)
            assert (first.id, first.text, first.prompt_token_ids) == (7, " wörld", stream.prompt_ids)
            assert (last.text, last.token_ids, last.finish_reason, last.stop_reason) == ("", [END], "stop", END)
            assert last.usage is not None
            assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (len(stream.prompt_ids), at + 1)
            assert last.usage.cached_tokens == 2
            assert first.usage is None
            assert last.prompt_token_ids is None
        assert fake.aborted == []
        assert fake.front.router.open == 0

    run(work)


def test_prompts_of_every_kind_are_encoded() -> None:
    fake = Fake()

    async def work() -> None:
        async with fake.front.open(submit([5, 6, 7])) as stream:
            assert stream.prompt_ids == [5, 6, 7]
        async with fake.front.open(submit([ChatMessage("user", "hello")])) as stream:
            assert stream.prompt_ids == fake.front.tokenizer.encode("<|user|>hello<|end|>", add_special_tokens=False)
        async with fake.front.open(Submit(id=1, prompt="hello", add_special_tokens=False)) as stream:
            assert stream.prompt_ids == fake.ids("hello")
        bad: list[str | list[int | ChatMessage]] = [[], [5, ChatMessage("user", "x")], [100_000], [5] * 200]
        for prompt in bad:
            with pytest.raises(InvalidRequest):
                await fake.front.open(submit(prompt)).__aenter__()
        with pytest.raises(InvalidRequest, match="100000 characters") as refusal:
            await fake.front.open(submit("a" * 100_000)).__aenter__()
        assert refusal.value.code == "context_length_exceeded"
        with pytest.raises(InvalidRequest, match="field of its own"):
            await fake.front.open(
                Submit(id=1, prompt=[ChatMessage("user", "x")], chat_template_kwargs={"messages": "y"})
            ).__aenter__()

    run(work)
    assert fake.front.router.open == 0


def test_stop_strings_across_increments_abort_the_request() -> None:
    fake = Fake()

    async def work() -> None:
        async with fake.front.open(submit(stop=["END"])) as stream:
            [generate] = fake.generates
            at = fake.say_text(generate.request_id, "the E")
            at = fake.say_text(generate.request_id, "N", at)
            at = fake.say_text(generate.request_id, "D and more", at)
            fake.say_text(generate.request_id, "late", at)  # the scheduler has not read the abort yet
            deltas = await rest(stream)
            assert text_of(deltas) == "the "
            assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == ("stop", "END")
            assert fake.aborted == [generate.request_id]
            tokens = [token for delta in deltas for token in delta.token_ids]
            assert deltas[-1].usage is not None
            assert deltas[-1].usage.completion_tokens == len(tokens)
            assert "D" in fake.front.tokenizer.token_text(tokens[-1])

    run(work)
    assert len(fake.aborted) == 1


@pytest.mark.parametrize(("finish", "text"), [("length", "the EN"), ("abort", "the EN")])
def test_held_text_is_sent_at_the_end(finish: str, text: str) -> None:
    fake = Fake()

    async def work() -> None:
        async with fake.front.open(submit(stop=["END"])) as stream:
            fake.say_text(fake.generates[0].request_id, "the EN", finish=finish)
            deltas = await rest(stream)
            assert (text_of(deltas), deltas[-1].finish_reason) == (text, finish)

    run(work)


def test_stop_strings_wait_for_min_tokens() -> None:
    fake = Fake()

    async def work() -> None:
        least = len(fake.ids("a END b"))
        async with fake.front.open(submit(stop=["END"], min_tokens=least, include_stop_str_in_output=True)) as stream:
            at = fake.say_text(fake.generates[0].request_id, "a END b")
            fake.say_text(fake.generates[0].request_id, " END c", at)
            assert text_of(await rest(stream)) == "a END b END"

    run(work)


def test_an_end_tokens_text_is_left_out_unless_asked_for() -> None:
    fake = Fake()

    async def work() -> None:
        [bang] = fake.ids("!")
        for include, expected in ((False, "hi"), (True, "hi!")):
            async with fake.front.open(submit(stop_token_ids=[bang], include_stop_str_in_output=include)) as stream:
                fake.say_text(fake.generates[-1].request_id, "hi!", finish="stop", stop_reason=bang)
                assert text_of(await rest(stream)) == expected

    run(work)


def test_duplicates_are_dropped_and_a_gap_is_an_error() -> None:
    fake = Fake()

    async def work() -> None:
        async with fake.front.open(submit(logprobs=1)) as stream:
            request_id = fake.generates[0].request_id
            ids = fake.ids("hello world, hello")
            fake.say(Update(request_id=request_id, index=0, tokens=ids[:2], logprobs=scores(ids[:2])))
            fake.say(Update(request_id=request_id, index=0, tokens=ids[:2], logprobs=scores(ids[:2])))
            fake.say(Update(request_id=request_id, index=1, tokens=ids[1:4], logprobs=scores(ids[1:4])))
            first, second = [await anext(stream) for _ in range(2)]
            assert first.token_ids + second.token_ids == ids[:4]
            assert [len(delta.logprobs or []) for delta in (first, second)] == [2, 2]
            fake.say(Update(request_id=request_id, index=5, tokens=ids[5:6]))
            with pytest.raises(InternalError, match="lost"):
                await anext(stream)
            with pytest.raises(StopAsyncIteration):
                await anext(stream)
        assert fake.aborted == [request_id]

    run(work)


def test_choices_are_interleaved_and_have_their_own_seeds() -> None:
    fake = Fake()

    async def work() -> None:
        async with fake.front.open(submit(n=3, seed=40)) as stream:
            assert [generate.sampling.seed for generate in fake.generates] == [40, 41, 42]
            for number, generate in reversed(list(enumerate(fake.generates))):
                fake.say_text(generate.request_id, f"answer {number}", finish="length")
            deltas = await rest(stream)
            assert [delta.index for delta in deltas] == [2, 1, 0]
            assert [text_of(deltas, index) for index in range(3)] == [f"answer {index}" for index in range(3)]
            assert [delta.prompt_token_ids is None for delta in deltas] == [True, True, False]

    run(work)


def test_leaving_early_aborts_and_releases() -> None:
    fake = Fake("sql")

    async def left_with_an_error() -> None:
        async with fake.front.open(Submit(id=1, prompt="hello", lora="sql", params=SamplingParams(n=2))):
            assert fake.front.adapters.cards()[0].running == 2
            fake.say_text(fake.generates[0].request_id, "done", finish="length")
            raise KeyError

    async def work() -> None:
        with pytest.raises(KeyError):
            await left_with_an_error()
        assert fake.aborted == [fake.generates[1].request_id]
        assert fake.front.adapters.cards()[0].running == 0
        assert fake.front.router.open == 0
        assert await fake.front.router.wait_idle(0.01)

    run(work)


def test_cancelling_finishes_every_choice() -> None:
    fake = Fake()

    async def work() -> None:
        async with fake.front.open(submit(n=2, stop=["END"])) as stream:
            first, second = fake.generates
            fake.say_text(first.request_id, "done", finish="length")
            fake.say_text(second.request_id, "half E")
            stream.cancel()
            stream.cancel()
            deltas = await rest(stream)
            assert fake.aborted == [second.request_id]
            assert [delta.finish_reason for delta in deltas] == ["length", None, "abort"]
            assert text_of(deltas, 1) == "half E"
            assert deltas[-1].usage is not None
        early = fake.front.open(submit())
        early.cancel()
        async with early:
            assert [delta.finish_reason for delta in await rest(early)] == ["abort"]

    run(work)
    assert fake.front.router.open == 0


def test_a_request_that_takes_too_long_is_ended() -> None:
    fake = Fake(request_timeout=0.05)

    async def work() -> None:
        async with fake.front.open(submit("hello", n=2)) as stream:
            with pytest.raises(TimedOut, match=r"after 0\.05 seconds"):
                await rest(stream)
            assert fake.aborted == [generate.request_id for generate in fake.generates]
        async with fake.front.open(submit("hello")) as stream:
            generate = fake.generates[-1]
            fake.say(Update(request_id=generate.request_id, index=0, tokens=[END], finish="stop", stop_reason=END))
            await asyncio.sleep(0.1)
            assert [delta.finish_reason for delta in await rest(stream)] == ["stop"]

    run(work)
