"""Completion: the finished result of one choice, joined from its deltas."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from engine.messages import Delta, FinishReason, PositionLogprobs, Usage


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """The finished result of one choice. `stop_reason` is the stop string or token id that ended it."""

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    stop_reason: str | int | None
    usage: Usage
    logprobs: list[PositionLogprobs] | None = None
    prompt_logprobs: list[PositionLogprobs | None] | None = None


def join(deltas: Sequence[Delta]) -> Completion:
    """Joins all deltas of one choice, in order, into a Completion."""
    last = deltas[-1]
    assert last.finish_reason is not None
    assert last.usage is not None
    scored = any(delta.logprobs is not None for delta in deltas)
    prompt_pieces = [delta.prompt_logprobs for delta in deltas if delta.prompt_logprobs is not None]
    return Completion(
        text="".join(delta.text for delta in deltas),
        token_ids=[token for delta in deltas for token in delta.token_ids],
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
        usage=last.usage,
        logprobs=[position for delta in deltas for position in delta.logprobs or ()] if scored else None,
        prompt_logprobs=[position for piece in prompt_pieces for position in piece] if prompt_pieces else None,
    )
