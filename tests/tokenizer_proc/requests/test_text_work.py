"""Texts of callers: small ones at once, long ones in a thread, too long ones are refused before any work."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
from fixtures.models import small_tokenizers
from fixtures.serving.fake_frontend import byte_tokenizer
from fixtures.serving.tokenizer_front import TEMPLATE

from engine.errors import InvalidRequest, Overloaded
from engine.messages import ChatMessage
from tokenizer_proc.requests import text_work
from tokenizer_proc.requests.text_work import INLINE_CHARACTERS, INLINE_IDS, INLINE_MESSAGES, TextWork
from tokenizer_proc.text.templates.chat_template import ChatTemplate
from tokenizer_proc.text.tokenizer import Tokenizer, TooManyTokens
from tokenizer_proc.work.pools import WorkPools

T = TypeVar("T")

MAIN = threading.main_thread()


class Watched(Tokenizer):
    """A tokenizer that records the threads in which it works, and waits in each until it is let go."""

    def __init__(self, held: bool = False) -> None:
        super().__init__(byte_tokenizer().backend)
        self.threads: list[threading.Thread] = []
        self.go = threading.Semaphore(0 if held else 1000)

    def encode(self, text: str, add_special_tokens: bool = True, most: int | None = None) -> list[int]:
        self.threads.append(threading.current_thread())
        assert self.go.acquire(timeout=20)
        return super().encode(text, add_special_tokens, most)

    def decode(self, ids: Any, skip_special_tokens: bool = True) -> str:
        self.threads.append(threading.current_thread())
        return super().decode(ids, skip_special_tokens)


class WatchedTemplate(ChatTemplate):
    def __init__(self) -> None:
        super().__init__(TEMPLATE)
        self.threads: list[threading.Thread] = []

    def render(self, *arguments: Any, **kwargs: Any) -> str:
        self.threads.append(threading.current_thread())
        return super().render(*arguments, **kwargs)


def run(scenario: Callable[[TextWork, WorkPools], Awaitable[T]]) -> T:
    async def inside() -> T:
        pools = WorkPools()
        try:
            return await asyncio.wait_for(scenario(TextWork(pools), pools), 20)
        finally:
            pools.close()

    return asyncio.run(inside())


def encoded(tokenizer: Tokenizer, text: str, *limits: int) -> list[int]:
    return run(lambda texts, _: texts.encode("", tokenizer, text, False, *limits))


def rendered(chat: ChatTemplate, messages: list[ChatMessage], **arguments: Any) -> str:
    return run(
        lambda texts, _: texts.render(
            "", chat, messages, add_generation_prompt=True, continue_final_message=False, arguments=arguments
        )
    )


@pytest.mark.parametrize(("length", "is_inline"), [(INLINE_CHARACTERS, True), (INLINE_CHARACTERS + 1, False)])
def test_only_a_long_text_is_encoded_in_a_thread(length: int, is_inline: bool) -> None:
    tokenizer = Watched()
    assert encoded(tokenizer, "a" * length) == [97] * length
    assert [thread is MAIN for thread in tokenizer.threads] == [is_inline]


def test_a_text_beyond_the_bound_is_never_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Watched()
    monkeypatch.setattr(text_work, "MOST_CHARACTERS", INLINE_CHARACTERS + 10)
    assert len(encoded(tokenizer, "a" * (INLINE_CHARACTERS + 10))) == INLINE_CHARACTERS + 10
    with pytest.raises(InvalidRequest) as raised:
        encoded(tokenizer, "a" * (INLINE_CHARACTERS + 11))
    assert (raised.value.param, raised.value.code) == ("prompt", "text_too_long")
    assert str(INLINE_CHARACTERS + 10) in raised.value.message
    assert len(tokenizer.threads) == 1


@pytest.mark.parametrize(
    ("context", "most"), [(0, 4 << 20), (2048, 256 << 10), (32_768, 512 << 10), (1 << 20, 4 << 20)]
)
def test_the_bound_of_a_text_follows_the_context(context: int, most: int) -> None:
    """Encoding takes some hundred bytes a character, and a text far beyond the context fits no request."""

    async def scenario(pools: WorkPools) -> None:
        texts, tokenizer = TextWork(pools, max_length=lambda: context), Watched()
        with pytest.raises(InvalidRequest, match=f"at most {most}"):
            await texts.encode("", tokenizer, "a" * (most + 1), False)
        assert not tokenizer.threads

    run(lambda _, pools: scenario(pools))


def test_memory_of_a_long_text_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[threading.Thread] = []
    monkeypatch.setattr(text_work.freed_memory, "give_back", lambda: calls.append(threading.current_thread()))
    encoded(Watched(), "a" * text_work.TRIM_CHARACTERS)
    assert calls == []
    encoded(Watched(), "a" * (text_work.TRIM_CHARACTERS + 1))
    assert len(calls) == 1
    assert calls[0] is not MAIN


def test_more_tokens_than_the_caller_can_use_are_refused() -> None:
    with pytest.raises(TooManyTokens, match="at most 5"):
        encoded(Watched(), "a" * (INLINE_CHARACTERS + 1), 5)


@pytest.mark.parametrize(("length", "is_inline"), [(INLINE_IDS, True), (INLINE_IDS + 1, False)])
def test_only_many_ids_are_decoded_in_a_thread(length: int, is_inline: bool) -> None:
    tokenizer = Watched()
    assert run(lambda texts, _: texts.decode("", tokenizer, [97] * length, False)) == "a" * length
    assert [thread is MAIN for thread in tokenizer.threads] == [is_inline]


@pytest.mark.parametrize("length", [10, INLINE_IDS + 1])
def test_an_id_outside_of_the_vocabulary_is_named(length: int) -> None:
    with pytest.raises(InvalidRequest, match=r"tokens\[7\] = 999 is outside") as raised:
        run(lambda texts, _: texts.decode("", Watched(), [97] * 7 + [999] + [97] * length, False))
    assert raised.value.param == "tokens[7]"


def test_more_ids_than_the_bound_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_work, "MOST_TOKENS", 5)
    with pytest.raises(InvalidRequest, match="at most 5"):
        run(lambda texts, _: texts.decode("", Watched(), [97] * 6, False))


@pytest.mark.parametrize(
    ("messages", "is_inline"),
    [
        ([ChatMessage("user", "a" * INLINE_CHARACTERS)], True),
        ([ChatMessage("user", "a" * (INLINE_CHARACTERS + 1))], False),
        ([ChatMessage("user", "")] * (INLINE_MESSAGES + 1), False),
    ],
)
def test_only_a_large_chat_is_rendered_in_a_thread(messages: list[ChatMessage], is_inline: bool) -> None:
    chat = WatchedTemplate()
    assert rendered(chat, messages) == ChatTemplate(TEMPLATE).render(messages)
    assert [thread is MAIN for thread in chat.threads] == [is_inline]


def test_a_chat_beyond_the_bounds_is_never_rendered(monkeypatch: pytest.MonkeyPatch) -> None:
    chat = WatchedTemplate()
    monkeypatch.setattr(text_work, "MOST_CHARACTERS", 20)
    monkeypatch.setattr(text_work, "MOST_MESSAGES", 3)
    for messages, arguments in (
        ([ChatMessage("user", "a" * 11)] * 2, {}),
        ([ChatMessage("user", "a")], {"instructions": "a" * 20}),
        ([ChatMessage("user", "")] * 4, {}),
    ):
        with pytest.raises(InvalidRequest, match="at most") as raised:
            rendered(chat, messages, **arguments)
        assert raised.value.param == "messages"
    assert not chat.threads


def test_abandoned_texts_delay_no_other_tenant() -> None:
    """Eight long texts of a caller that leaves: what had not begun never does, and another tenant's text passes."""
    tokenizer, other = Watched(held=True), Watched()
    text = "a" * (text_work.LARGE_CHARACTERS + 1)

    async def scenario(texts: TextWork, pools: WorkPools) -> None:
        calls = [asyncio.ensure_future(texts.encode("a", tokenizer, text, False)) for _ in range(8)]
        while not tokenizer.threads:
            await asyncio.sleep(0.001)
        assert len(await texts.encode("b", other, "a" * (INLINE_CHARACTERS + 1), False)) == INLINE_CHARACTERS + 1
        assert not any(call.done() for call in calls)
        begun = pools.texts.running
        for call in calls:
            call.cancel()
        await asyncio.wait(calls)
        assert pools.texts.waiting == 0
        tokenizer.go.release(1000)
        while pools.texts.running:
            await asyncio.sleep(0.001)
        assert len(tokenizer.threads) == begun < 8

    run(scenario)


def test_a_tenant_with_too_many_long_texts_is_refused() -> None:
    tokenizer = Watched(held=True)

    async def scenario(texts: TextWork, pools: WorkPools) -> None:
        pools.texts.most_waiting = 2
        text = "a" * (text_work.LARGE_CHARACTERS + 1)
        calls = [asyncio.ensure_future(texts.encode("a", tokenizer, text, False)) for _ in range(12)]
        await asyncio.sleep(0)
        done = [call for call in calls if call.done()]
        assert len(done) == 10 - pools.texts.running
        assert all(isinstance(call.exception(), Overloaded) for call in done)
        tokenizer.go.release(1000)
        await asyncio.wait(calls)

    run(scenario)


def test_a_long_text_has_the_same_tokens_in_a_thread(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(small_tokenizers.save(small_tokenizers.byte_level(), tmp_path))
    text = "hello world, déjà vu " * 2000
    assert encoded(tokenizer, text) == tokenizer.encode(text, add_special_tokens=False)
