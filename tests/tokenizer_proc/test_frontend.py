"""Streams of a front end whose scheduler is the test."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest
from fixtures.serving.tokenizer_front import END, ENDPOINTS, Fake, capacity, scores

from engine.client.completion import join
from engine.errors import (
    AdapterError,
    EngineDead,
    EngineError,
    InternalError,
    InvalidRequest,
    NotFound,
    Overloaded,
    TimedOut,
)
from engine.messages import (
    AdapterState,
    ChatMessage,
    Delta,
    Footprint,
    Generate,
    LoadAdapter,
    Progress,
    SamplingParams,
    Stats,
    Submit,
    Update,
)
from tokenizer_proc import frontend
from tokenizer_proc.frontend import Stream


def run(work: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        await asyncio.wait_for(work(), 10)

    asyncio.run(main())


def submit(prompt: str | list[int | ChatMessage] = "hello", **params: object) -> Submit:
    return Submit(id=7, prompt=prompt, params=SamplingParams(**params))  # type: ignore[arg-type]


async def rest(stream: Stream) -> list[Delta]:
    return [delta async for delta in stream]


def text_of(deltas: list[Delta], index: int = 0) -> str:
    return "".join(delta.text for delta in deltas if delta.index == index)


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


def test_default_seeds_are_deterministic_by_config() -> None:
    def seeds(seed: int | None) -> list[int]:
        fake = Fake(seed=seed)

        async def work() -> None:
            for _ in range(3):
                async with fake.front.open(submit()):
                    pass

        run(work)
        return [generate.sampling.seed for generate in fake.generates]

    assert seeds(1) == seeds(1) != seeds(2)
    assert len(set(seeds(1))) == 3
    assert seeds(None) != seeds(None)


def test_logprobs_carry_text_and_exact_bytes() -> None:
    fake = Fake()

    async def work() -> None:
        ids = fake.ids("🙂")
        async with fake.front.open(submit([5, 6, 7], logprobs=1, prompt_logprobs=0, n=2)) as stream:
            first, second = fake.generates
            assert (first.sampling.prompt_logprobs, second.sampling.prompt_logprobs) == (0, -1)
            fake.say(Update(request_id=first.request_id, index=0, prompt_logprobs=scores([6, 7])))
            for generate in (first, second):
                fake.say(
                    Update(request_id=generate.request_id, index=0, tokens=ids, logprobs=scores(ids), finish="length")
                )
            prompt, one, two = await rest(stream)
            assert one.logprobs is not None
            joined = b"".join(bytes(position.chosen.bytes) for position in one.logprobs)
            assert joined.decode() == one.text == "🙂"
            assert one.logprobs[0].chosen.token == "\ufffd"
            assert [entry.token_id for entry in one.logprobs[0].top] == [ids[0], 5]
            assert prompt.prompt_logprobs is not None
            assert [None if each is None else each.chosen.token_id for each in prompt.prompt_logprobs] == [None, 6, 7]
            assert (one.prompt_logprobs, two.prompt_logprobs) == (None, None)

    run(work)


def _shown(deltas: list[Delta]) -> list[list[int | None] | None]:
    """The prompt positions of each delta."""
    return [
        None if each.prompt_logprobs is None else [p and p.chosen.token_id for p in each.prompt_logprobs]
        for each in deltas
    ]


def test_prompt_logprobs_come_in_pieces_and_once() -> None:
    """A scheduler that takes over starts again, with pieces of another size."""
    fake = Fake()

    async def work() -> None:
        async with fake.front.open(submit([5, 6, 7, 8, 9], prompt_logprobs=1)) as stream:
            request_id = fake.generates[0].request_id

            def say(index: int, *ids: int, **fields: Any) -> None:
                piece = scores(list(ids)) if ids else None
                fake.say(Update(request_id=request_id, index=0, prompt_logprobs=piece, prompt_index=index, **fields))

            say(0, 6, 7)
            say(0, 6)
            say(1, 7, 8)
            say(0, 6, 7, 8, 9)
            say(0, tokens=[5], finish="length")
            deltas = await rest(stream)
        assert _shown(deltas) == [[None, 6, 7], [8], [9], None]
        assert join(deltas).prompt_logprobs == [p for delta in deltas for p in delta.prompt_logprobs or []]

    run(work)


def test_prompt_logprobs_with_a_gap_are_an_error() -> None:
    fake = Fake()

    async def work() -> None:
        async with fake.front.open(submit([5, 6, 7, 8], prompt_logprobs=1)) as stream:
            request_id = fake.generates[0].request_id
            fake.say(Update(request_id=request_id, index=0, prompt_logprobs=scores([7]), prompt_index=1))
            with pytest.raises(InternalError, match="prompt positions 0 to 1 of a request were lost"):
                await rest(stream)

    run(work)


def test_a_prompt_of_one_token_has_one_position() -> None:
    fake = Fake()

    async def work() -> None:
        async with fake.front.open(submit([5], prompt_logprobs=1)) as stream:
            fake.say(Update(request_id=fake.generates[0].request_id, index=0, tokens=[6], finish="length"))
            assert _shown(await rest(stream)) == [[None]]

    run(work)


def test_a_request_that_grew_larger_than_a_frame_fails_alone() -> None:
    """Another scheduler takes over and is told the tokens of each request."""
    fake = Fake()
    told: list[Generate] = []

    def send(message: msgspec.Struct) -> None:
        if isinstance(message, Generate) and len(message.generated) > 1:
            raise InternalError("a Generate of 9 bytes exceeds the frame bound")
        if isinstance(message, Generate):
            told.append(message)

    async def work() -> None:
        async with fake.front.open(submit([5], n=2, seed=1)) as large, fake.front.open(submit([6])) as small:
            ids = [each.request_id for each in fake.generates]
            fake.say(Update(request_id=ids[0], index=0, tokens=[7, 8]))
            fake.front.router._send = send
            fake.front.recover(1)
            assert [each.request_id for each in told] == [ids[2]]
            fake.front.handle(Progress(0, [Update(request_id=ids[2], index=0, tokens=[7], finish="length")], 1))
            assert (await rest(small))[-1].finish_reason == "length"
            with pytest.raises(InternalError, match="frame bound"):
                await rest(large)

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


def test_adapters_reach_the_scheduler_by_id() -> None:
    fake = Fake("sql", "poet")

    async def work() -> None:
        for lora, expected in (("poet", [(2, 1.0)]), ({"sql": 0.5, "poet": 2.0}, [(1, 0.5), (2, 2.0)])):
            async with fake.front.open(Submit(id=1, prompt="hello", lora=lora)):
                assert fake.generates[-1].lora == expected
        with pytest.raises(NotFound):
            await fake.front.open(Submit(id=1, prompt="hello", lora="nope")).__aenter__()
        for number in (1, 2):
            fake.front.handle(AdapterState(adapter_id=number, state="host", footprint=Footprint({"qkv": 5})))
        with pytest.raises(InvalidRequest, match="10 rank pages in qkv; at most 8"):
            await fake.front.open(Submit(id=1, prompt="hello", lora={"sql": 1.0, "poet": 1.0})).__aenter__()

    run(work)


def test_an_error_of_the_scheduler_reaches_the_reader() -> None:
    fake = Fake("sql")

    async def work() -> None:
        for lora, kind in ((None, InternalError), ("sql", AdapterError)):
            async with fake.front.open(Submit(id=1, prompt="hello", lora=lora, params=SamplingParams(n=2))) as stream:
                one, two = fake.generates[-2:]
                fake.say(Update(request_id=one.request_id, index=0, error="boom"))
                with pytest.raises(kind, match="boom"):
                    await anext(stream)
                assert fake.aborted[-1] == two.request_id
        fake.front.handle(AdapterState(adapter_id=1, state="failed", error="bits"))
        with pytest.raises(AdapterError, match="`sql`: bits"):
            await fake.front.open(Submit(id=1, prompt="hello", lora="sql")).__aenter__()

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


def test_requests_are_refused_while_loading_and_draining() -> None:
    fake = Fake("sql", ready=False)

    async def work() -> None:
        assert not fake.front.is_ready
        with pytest.raises(Overloaded, match="loading"):
            await fake.front.open(submit()).__aenter__()
        fake.front.handle(capacity(fake.front.tokenizer.vocab_size, kv_pages=3))
        assert [message.adapter_id for message in fake.sent if isinstance(message, LoadAdapter)] == [1]
        assert not fake.front.is_ready
        fake.front.handle(AdapterState(adapter_id=1, state="resident"))
        assert fake.front.is_ready
        assert fake.front.max_length == 48
        async with fake.front.open(submit()) as stream:
            drain = asyncio.ensure_future(fake.front.drain(0.05))
            with pytest.raises(EngineDead, match="shutting down"):
                await anext(stream)
        await drain
        with pytest.raises(Overloaded, match="shutting down"):
            await fake.front.open(submit()).__aenter__()
        assert not fake.front.is_ready

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


def test_facts_and_metrics_are_shown() -> None:
    fake = Fake("sql", "poet")

    async def work() -> None:
        async with fake.front.open(Submit(id=1, prompt="hello", lora="sql")) as stream:
            fake.say_text(fake.generates[0].request_id, "abc", finish="length")
            await rest(stream)
        fake.front.handle(
            Stats(running=2, waiting=3, kv_pages_used=25, kv_pages=100, running_adapters={1: 2}, step_seconds=[0.01])
        )
        with pytest.raises(InvalidRequest):
            await fake.front.open(submit(top_p=7.0)).__aenter__()

    run(work)
    text = fake.front.metrics.render().decode()
    assert 'vllm:num_requests_running{model_name="base"} 2.0' in text
    assert 'vllm:kv_cache_usage_perc{model_name="base"} 0.25' in text
    assert 'chorus:adapter_requests_total{adapter="sql"} 1.0' in text
    assert 'vllm:request_success_total{finished_reason="length",model_name="base"} 1.0' in text
    assert 'vllm:time_to_first_token_seconds_count{model_name="base"} 1.0' in text
    assert 'chorus:step_seconds_count{model_name="base"} 1.0' in text
    assert 'chorus:request_failures_total{kind="invalid_request_error",model_name="base"} 1.0' in text
    fake.front.handle(AdapterState(adapter_id=1, state="gone"))
    assert 'adapter="sql"' not in fake.front.metrics.render().decode()
    info = fake.front.info()
    assert info["capacity"]["page_size"] == 16
    assert info["stats"]["waiting"] == 3
    assert info["adapters"] == ["poet"]


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
            news = Update(request_id=generate.request_id, index=at, tokens=[END], finish="stop", stop_reason=END)
            fake.front.handle(Progress(0, [news], 1))
            deltas = await rest(stream)
            assert [token for delta in deltas for token in delta.token_ids] == [*told, END]

    run(work)


def test_open_requests_without_updates_make_it_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake()
    monkeypatch.setattr(frontend, "STUCK_SECONDS", 0.05)

    async def work() -> None:
        await asyncio.sleep(0.1)
        assert not fake.front.is_stuck  # no request is open
        async with fake.front.open(submit("hello")):
            assert not fake.front.is_stuck  # the request is new
            await asyncio.sleep(0.1)
            assert fake.front.is_stuck
            fake.front.handle(Stats())
            assert not fake.front.is_stuck

    run(work)


@pytest.mark.parametrize(
    ("picture", "stuck"),
    [
        (Stats(waiting=1, waiting_reasons={"load": 1}), False),
        (Stats(waiting=1, waiting_reasons={"fill": 1}), False),
        (Stats(waiting=1, waiting_reasons={"turn": 1}), True),
        (Stats(running=1), True),
        (Stats(running=1, waiting=1, waiting_reasons={"load": 1}), True),
        (Stats(running=1, steps=1), False),
    ],
)
def test_a_wait_for_an_adapter_is_not_a_hung_step(picture: Stats, stuck: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scheduler sends Stats each second, also while the runner hangs."""
    fake = Fake()
    monkeypatch.setattr(frontend, "STUCK_SECONDS", 0.05)

    async def work() -> None:
        async with fake.front.open(submit("hello")):
            await asyncio.sleep(0.1)
            fake.front.handle(picture)
            assert fake.front.is_stuck == stuck

    run(work)


def test_an_activated_adapter_is_not_mixed_and_shows_its_tokens() -> None:
    fake = Fake("sql", "fox")
    fake.front.handle(AdapterState(adapter_id=1, state="host", revision="r", invocation=[5, 6]))

    async def work() -> None:
        for mix in ({"sql": 0.5, "fox": 0.5}, {"fox": 1.0, "sql": 0.0}):
            with pytest.raises(InvalidRequest, match=r"`sql` acts from its invocation on .*: do not mix it"):
                await fake.front.open(Submit(id=1, prompt="hello", lora=mix)).__aenter__()
        async with fake.front.open(Submit(id=1, prompt="hello", lora={"sql": 0.5})):
            assert fake.generates[-1].lora == [(1, 0.5)]
        cards = {card.name: card.invocation for card in fake.front.adapters.cards()}
        assert cards == {"sql": [5, 6], "fox": []}

    run(work)


def failures(fake: Fake) -> list[str]:
    """The metrics of failures and aborts."""
    lines = fake.front.metrics.render().decode().splitlines()
    return [line for line in lines if line.startswith(("chorus:request_failures_total", "vllm:request_success_total"))]


def test_choices_that_fail_together_count_as_one_failure(caplog: pytest.LogCaptureFixture) -> None:
    fake = Fake()
    caplog.set_level("INFO")

    async def work() -> None:
        async with fake.front.open(submit(n=3)) as stream:
            await fake.front.drain(0.0)
            stream.cancel()
            with pytest.raises(EngineDead):
                await anext(stream)
            with pytest.raises(StopAsyncIteration):
                await anext(stream)

    run(work)
    assert failures(fake) == ['chorus:request_failures_total{kind="service_unavailable",model_name="base"} 1.0']
    assert [line for line in caplog.messages if "did not finish" in line] == [
        "3 answers did not finish in time and are aborted"
    ]


def test_choices_of_one_request_count_once_for_its_adapter() -> None:
    fake = Fake("sql")

    async def work() -> None:
        async with fake.front.open(Submit(id=1, prompt=[5, 6, 7], lora="sql", params=SamplingParams(n=3))):
            pass

    run(work)
    text = fake.front.metrics.render().decode()
    assert 'chorus:adapter_requests_total{adapter="sql"} 1.0' in text
    assert 'chorus:adapter_prompt_tokens_total{adapter="sql"} 9.0' in text
