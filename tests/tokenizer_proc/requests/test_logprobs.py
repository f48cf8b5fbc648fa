"""Log-probabilities of generated tokens and of prompts, which come in pieces."""

from __future__ import annotations

from typing import Any

import pytest
from fixtures.serving.streams import rest, run, submit
from fixtures.serving.tokenizer_front import Fake, scores

from engine.client.completion import join
from engine.errors import InternalError
from engine.messages import Delta, Update


def _shown(deltas: list[Delta]) -> list[list[int | None] | None]:
    """Returns the prompt positions of each delta."""
    return [
        None if each.prompt_logprobs is None else [p and p.chosen.token_id for p in each.prompt_logprobs]
        for each in deltas
    ]


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


def test_prompt_logprobs_come_in_pieces_and_once() -> None:
    """A scheduler that takes over sends the prompt's log-probabilities again, in pieces of another size."""
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
