"""What the front end refuses before anything of it reaches the scheduler, however large a body makes it."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest
from fixtures.serving.tokenizer_front import Fake

from engine.errors import InvalidRequest
from engine.messages import ChatMessage, SamplingParams, Stats, Submit


def refused(fake: Fake, submit: Submit) -> InvalidRequest:
    async def work() -> None:
        async with fake.front.open(submit):
            pass

    with pytest.raises(InvalidRequest) as raised:
        asyncio.run(work())
    assert not fake.generates
    return raised.value


@pytest.mark.parametrize("priority", [1 << 70, -(1 << 70), 1 << 31])
def test_a_priority_that_no_message_carries(priority: int) -> None:
    assert refused(Fake(), Submit(id=1, prompt="hello", priority=priority)).param == "priority"


def test_a_priority_that_would_change_nothing() -> None:
    error = refused(Fake(), Submit(id=1, prompt="hello", priority=-1))
    assert error.param == "priority"
    assert "--schedule-policy priority" in error.message


def test_a_priority_and_a_tenant_reach_the_scheduler() -> None:
    fake = Fake(priorities=True)

    async def work() -> None:
        async with fake.front.open(Submit(id=1, prompt="hello", priority=-3, tenant="alice")):
            pass

    asyncio.run(work())
    assert [(message.priority, message.cache_salt) for message in fake.generates] == [(-3, "alice")]


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 1e300, -101.0])
def test_a_scale_beyond_all_sense(scale: float) -> None:
    assert refused(Fake("sql"), Submit(id=1, prompt="hello", lora={"sql": scale})).param == "lora_path"


@pytest.mark.parametrize("prompt", [[5] * 129, [ChatMessage("user", "")] * 129])
def test_a_prompt_of_more_parts_than_the_context_is_not_even_rendered(
    prompt: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = Fake()
    monkeypatch.setattr(fake.front, "chat", None)
    error = refused(fake, Submit(id=1, prompt=prompt))
    assert (error.param, error.code) == ("prompt", "context_length_exceeded")
    assert "129" in error.message


def test_a_top_k_of_any_size_can_be_sent() -> None:
    fake = Fake()

    async def work() -> None:
        async with fake.front.open(Submit(id=1, prompt="hello", params=SamplingParams(top_k=1 << 80))):
            msgspec.msgpack.encode(fake.generates[0])

    asyncio.run(work())


def test_a_call_larger_than_the_bound_is_the_clients_fault() -> None:
    front = Fake(max_open_requests=3).front
    front.check_size(3)
    with pytest.raises(InvalidRequest, match="at most 3"):
        front.check_size(4)


def test_facts_leave_the_step_times_to_the_metrics() -> None:
    front = Fake().front
    front.handle(Stats(running=2, step_seconds=[0.5, 0.25]))
    assert front.info()["stats"]["running"] == 2
    assert front.info()["stats"]["step_seconds"] == []
