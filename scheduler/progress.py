"""Puts updates into Progress messages of bounded size, so that none exceeds a frame or takes long to decode.

updates    a  b(scores)  c  b(scores)  b        a message has at most MOST_ENTRIES entries, or one piece of scores
messages   [a c]  [b(scores)]  [b(scores) b]    updates without prompt scores come before those with scores
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from engine.messages import LogprobIds, Update

MOST_ENTRIES = 4096  # log-probabilities: 60 kB, which the tokenizer process handles in a few milliseconds


def pieces(request_id: int, index: int, scored: int, scores: Sequence[LogprobIds]) -> Iterator[Update]:
    """The log-probabilities of prompt positions from position `scored` on, as updates of bounded size."""
    start = 0
    while start < len(scores):
        length = max(1, MOST_ENTRIES // (1 + len(scores[start].top)))
        piece = list(scores[start : start + length])
        yield Update(request_id=request_id, index=index, prompt_logprobs=piece, prompt_index=scored + start)
        start += length


def messages(updates: Sequence[Update]) -> Iterator[list[Update]]:
    """The updates of each message. The updates of one request stay in order."""
    scored = {update.request_id for update in updates if update.prompt_logprobs is not None}
    first = [update for update in updates if update.request_id not in scored] if scored else updates
    last = [update for update in updates if update.request_id in scored] if scored else []
    found: list[Update] = []
    entries = 0
    for update in (*first, *last):
        size = _entries(update)
        if found and entries + size > MOST_ENTRIES:
            yield found
            found, entries = [], 0
        found.append(update)
        entries += size
    if found:
        yield found


def _entries(update: Update) -> int:
    """How many log-probabilities an update has, of tokens, prompt positions and their alternatives; at least 1."""
    found = max(1, len(update.tokens))
    for scores in (update.logprobs, update.prompt_logprobs):
        if scores is not None:
            found += sum(len(each.top) for each in scores)
    return found if update.prompt_logprobs is None else found + len(update.prompt_logprobs)
