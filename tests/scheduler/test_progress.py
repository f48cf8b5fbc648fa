"""scheduler.progress: each Step and Progress message stays small, however many log-probabilities a client requests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from fixtures.scheduling.by_hand import capacity_of, generate, plan_of

from engine.messages import LogprobIds, Progress, Sampling, Step, StepDone, Update
from scheduler.core import Scheduler
from scheduler.state import Bounds

TOP = [(100_000 + n, -1.5) for n in range(20)]
SMALL = 128 << 10
STEP = 8 << 20


def _core(**changes: Any) -> Scheduler:
    numbers = {"kv_pages": 1 << 16, "page_size": 16, "max_length": 1 << 18, "max_batched_tokens": 1 << 16, "rows": 64}
    core = Scheduler(capacity_of(**(numbers | changes)), Bounds(2))
    core.drain_outbox()
    return core


def _answer(step: Step) -> StepDone:
    """Returns the result of a step, with the log-probabilities of TOP for each scored position."""
    scores = {
        number: [LogprobIds(chunk.start + at + 1, -0.5, TOP) for at in range(chunk.length - chunk.samples)]
        for number, chunk in enumerate(step.chunks)
        if chunk.scores
    }
    tokens = [50] * sum(chunk.samples for chunk in step.chunks)
    return StepDone(epoch=0, id=step.id, tokens=tokens, prompt_logprobs=scores)


def _run(core: Scheduler) -> Iterator[list[Progress]]:
    """Runs all steps, and yields the Progress messages after each."""
    while (step := core.plan(0.0)) is not None:
        core.check(64)
        assert len(msgspec.msgpack.encode(step)) < STEP
        done = _answer(step)
        assert len(msgspec.msgpack.encode(done)) < STEP
        yield [message for message in core.handle(done, 0.0) if isinstance(message, Progress)]


@pytest.mark.parametrize("length", [2, 300, 30_000])
def test_prompt_logprobs_travel_in_small_frames(length: int) -> None:
    core = _core()
    core.handle(generate(1, prompt=length, max_tokens=1, sampling=Sampling(prompt_logprobs=20)), 0.0)
    sent = [message for messages in _run(core) for message in messages]
    assert max(len(msgspec.msgpack.encode(message)) for message in sent) < SMALL
    updates = [update for message in sent for update in message.updates]
    *scored, last = updates
    assert (last.tokens, last.finish, last.prompt_logprobs) == ([50], "length", None)
    known = 0
    for update in scored:
        assert (update.index, update.tokens, update.prompt_index) == (0, [], known)
        known += len(update.prompt_logprobs or [])
    positions = [each.token_id for update in scored for each in update.prompt_logprobs or []]
    assert positions == list(range(1, length))


def test_decodes_come_before_prompt_logprobs() -> None:
    core = _core(max_batched_tokens=1024)
    core.handle(generate(1, max_tokens=9), 0.0)
    next(_run(core))
    core.handle(generate(2, prompt=900, max_tokens=9, sampling=Sampling(prompt_logprobs=20)), 0.0)
    sent = next(_run(core))
    assert len(sent) > 1
    assert sent[0].updates[0].request_id == 1


def test_updates_of_a_large_batch_are_several_frames() -> None:
    core = _core(rows=512, kv_pages=4096)
    for number in range(1, 401):
        core.handle(generate(number, max_tokens=1, sampling=Sampling(logprobs=20)), 0.0)
    step = plan_of(core)
    own = {number: LogprobIds(50, -0.5, TOP) for number in range(400)}
    sent = core.handle(StepDone(epoch=0, id=step.id, tokens=[50] * 400, logprobs=own), 0.0)
    assert all(isinstance(message, Progress) for message in sent)
    assert max(len(msgspec.msgpack.encode(message)) for message in sent) < SMALL
    updates: list[Update] = [update for message in sent if isinstance(message, Progress) for update in message.updates]
    assert [update.request_id for update in updates] == list(range(1, 401))


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(logit_bias=[(token, 1.5) for token in range(100_000)]),
        Sampling(end_ids=list(range(100_000, 300_000))),
        Sampling(repetition_penalty=1.1),
    ],
)
def test_large_new_rows_are_admitted_over_several_steps(sampling: Sampling) -> None:
    core = _core(max_batched_tokens=1 << 18)
    prompt = 100_000 if sampling.repetition_penalty != 1.0 else 3
    for number in range(1, 33):
        core.handle(generate(number, prompt=prompt, max_tokens=1, cache_salt="one", sampling=sampling), 0.0)
    updates = [update for messages in _run(core) for message in messages for update in message.updates]
    assert sorted(update.request_id for update in updates if update.finish) == list(range(1, 33))
