"""scheduler.results in scripted cases: tokens and log-probabilities of steps become updates."""

from __future__ import annotations

from fixtures.scheduling.by_hand import done, generate, new_core, plan_of

from engine.messages import LogprobIds, Sampling, Update


def test_end_id_stops_and_later_tokens_are_dropped() -> None:
    core = new_core(window=2)
    core.handle(generate(1, end_ids=[7]), 0.0)
    one, two = plan_of(core), plan_of(core)
    assert core.plan(0.0) is None
    assert two.chunks[0].start == 3
    assert done(core, one, token=7) == [Update(request_id=1, index=0, tokens=[7], finish="stop", stop_reason=7)]
    assert done(core, two) == []


def test_prompt_logprobs_are_sent_once_and_chunk_by_chunk() -> None:
    core = new_core()
    core.handle(generate(1, prompt=10, max_tokens=2, sampling=Sampling(prompt_logprobs=0, logprobs=0)), 0.0)
    step = plan_of(core)
    (chunk,) = step.chunks
    assert (chunk.scores, chunk.samples, chunk.length, len(chunk.tokens)) == (True, False, 8, 9)
    scores = [LogprobIds(10 + i, -float(i), []) for i in range(1, 10)]
    assert done(core, step, prompt_logprobs={0: scores[:8]}) == [
        Update(request_id=1, index=0, prompt_logprobs=scores[:8])
    ]
    step = plan_of(core)
    (chunk,) = step.chunks
    assert (chunk.scores, chunk.samples, chunk.length, len(chunk.tokens)) == (True, True, 2, 2)
    own = LogprobIds(50, -1.0, [])
    piece, update = done(core, step, prompt_logprobs={0: scores[8:]}, logprobs={0: own})
    assert piece == Update(request_id=1, index=0, prompt_logprobs=scores[8:], prompt_index=8)
    assert (update.prompt_logprobs, update.logprobs) == (None, [own])
    (update,) = done(core, plan_of(core), logprobs={0: own})
    assert (update.prompt_logprobs, update.finish) == (None, "length")


def test_the_time_in_the_queue_comes_with_the_first_token() -> None:
    core = new_core(rows=1)
    for number in (1, 2):
        core.handle(generate(number, max_tokens=2), 10.0)
    reported: list[tuple[int, float]] = []
    for now in (10.0, 11.0, 14.5, 15.0):
        step = core.plan(now)
        assert step is not None
        reported += [(update.request_id, update.queued) for update in done(core, step)]
    assert reported == [(1, 0.0), (1, 0.0), (2, 4.5), (2, 0.0)]
