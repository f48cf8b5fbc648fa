"""The front end: readiness, health, server information, metrics and adapters. The test plays its scheduler."""

from __future__ import annotations

import asyncio

import pytest
from fixtures.serving.streams import rest, run, submit
from fixtures.serving.tokenizer_front import Fake, capacity

from engine.errors import AdapterError, EngineDead, InternalError, InvalidRequest, NotFound, Overloaded
from engine.messages import AdapterState, Footprint, LoadAdapter, SamplingParams, Stats, Submit, Update
from tokenizer_proc import frontend


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
    ("stats", "stuck"),
    [
        (Stats(waiting=1, waiting_reasons={"load": 1}), False),
        (Stats(waiting=1, waiting_reasons={"fill": 1}), False),
        (Stats(waiting=1, waiting_reasons={"turn": 1}), True),
        (Stats(running=1), True),
        (Stats(running=1, waiting=1, waiting_reasons={"load": 1}), True),
        (Stats(running=1, steps=1), False),
    ],
)
def test_a_wait_for_an_adapter_is_not_a_hung_step(stats: Stats, stuck: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scheduler sends Stats each second, also while the runner hangs."""
    fake = Fake()
    monkeypatch.setattr(frontend, "STUCK_SECONDS", 0.05)

    async def work() -> None:
        async with fake.front.open(submit("hello")):
            await asyncio.sleep(0.1)
            fake.front.handle(stats)
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
    """Returns the metrics of failures and aborts."""
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


def test_times_and_tokens_of_requests_are_shown() -> None:
    fake = Fake()

    async def work() -> None:
        async with fake.front.open(submit("hello", n=2)) as stream:
            for generate, waited, text in zip(fake.generates, (3.0, 0.0), ("abc", "abcdef"), strict=True):
                fake.say(Update(request_id=generate.request_id, index=0, tokens=fake.ids("x"), queued=waited))
                fake.say_text(generate.request_id, text, len(fake.ids("x")), finish="length")
            await rest(stream)

    run(work)
    lines = fake.front.metrics.render().decode().splitlines()
    sums = {line.split("{")[0]: float(line.split()[-1]) for line in lines if "_sum{" in line or "_count{" in line}
    tokens = [len(fake.ids("x")) + len(fake.ids(text)) for text in ("abc", "abcdef")]
    assert sums["vllm:request_queue_time_seconds_sum"] == 3.0
    assert sums["vllm:request_queue_time_seconds_count"] == 2
    assert sums["vllm:request_prefill_time_seconds_count"] == sums["vllm:request_decode_time_seconds_count"] == 2
    assert sums["vllm:request_generation_tokens_sum"] == sum(tokens)
    assert sums["vllm:request_max_num_generation_tokens_sum"] == max(tokens)
    assert sums["vllm:request_max_num_generation_tokens_count"] == sums["vllm:request_prompt_tokens_count"] == 1
    assert sums["vllm:request_prompt_tokens_sum"] == len(fake.front.tokenizer.encode("hello"))
    assert sums["vllm:time_per_output_token_seconds_count"] == sums["vllm:inter_token_latency_seconds_count"] == 2
