"""Submits that the front end refuses before anything reaches the scheduler, however large their fields are."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest
from fixtures.serving.tokenizer_front import Fake

from engine.errors import InvalidRequest
from engine.messages import ChatMessage, SamplingParams, Submit
from tokenizer_proc.requests.stream import page_salt


def refused(fake: Fake, submit: Submit) -> InvalidRequest:
    async def work() -> None:
        async with fake.front.open(submit):
            pass

    with pytest.raises(InvalidRequest) as raised:
        asyncio.run(work())
    assert not fake.generates
    return raised.value


@pytest.mark.parametrize("priority", [1 << 70, -(1 << 70), 1 << 31])
def test_a_priority_beyond_the_messages_range_is_refused(priority: int) -> None:
    assert refused(Fake(), Submit(id=1, prompt="hello", priority=priority)).param == "priority"


def test_a_priority_without_the_policy_is_refused() -> None:
    error = refused(Fake(), Submit(id=1, prompt="hello", priority=-1))
    assert error.param == "priority"
    assert "--schedule-policy priority" in error.message


def test_a_priority_and_a_tenant_reach_the_scheduler() -> None:
    fake = Fake(priorities=True)

    async def work() -> None:
        async with fake.front.open(Submit(id=1, prompt="hello", priority=-3, tenant="alice")):
            pass

    asyncio.run(work())
    [message] = fake.generates
    assert (message.priority, message.cache_salt, message.tenant) == (-3, "alice", "alice")


def test_a_salt_never_leads_to_the_pages_of_another_tenant() -> None:
    asked = [(tenant, salt) for tenant in ("", "a", "ab", '["a","b"]') for salt in ("", "a", "b", "ab", '["a","b"]')]
    salts = [page_salt(Submit(id=1, prompt="x", tenant=tenant, cache_salt=salt)) for tenant, salt in asked]
    assert len(set(salts)) == len(asked)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 1e300, -101.0])
def test_a_scale_out_of_range_is_refused(scale: float) -> None:
    assert refused(Fake("sql"), Submit(id=1, prompt="hello", lora={"sql": scale})).param == "lora_path"


@pytest.mark.parametrize("prompt", [[5] * 129, [ChatMessage("user", "")] * 129])
def test_a_prompt_with_too_many_parts_is_not_rendered(prompt: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake()
    monkeypatch.setattr(fake.front.text_tools_for(None).chat, "prompt", None)
    error = refused(fake, Submit(id=1, prompt=prompt))
    assert (error.param, error.code) == ("prompt", "context_length_exceeded")
    assert "129" in error.message


def test_a_huge_top_k_can_be_sent() -> None:
    fake = Fake()

    async def work() -> None:
        async with fake.front.open(Submit(id=1, prompt="hello", params=SamplingParams(top_k=1 << 80))):
            msgspec.msgpack.encode(fake.generates[0])

    asyncio.run(work())


def test_a_call_with_too_many_choices_is_a_clients_error() -> None:
    front = Fake(max_open_requests=3).front
    front.check_size(3)
    with pytest.raises(InvalidRequest, match="at most 3"):
        front.check_size(4)
