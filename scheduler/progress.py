"""Puts updates into Progress messages of bounded size, so that none exceeds a frame or takes long to decode.

updates    a  b(scores)  c  b(scores)  b        a message has at most MOST_ENTRIES entries, or a single update
messages   [a c]  [b(scores)]  [b(scores) b]    requests without prompt scores come before requests with scores
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from engine.messages import LogprobIds, Update

MOST_ENTRIES = 4096  # log-probabilities in a message: 60 kB, which the tokenizer process decodes in a few milliseconds


def pieces(request_id: int, index: int, scored: int, scores: Sequence[LogprobIds]) -> Iterator[Update]:
    """Splits `scores`, the log-probabilities of prompt positions from `scored` on, into updates of bounded size."""
    start = 0
    while start < len(scores):
        length = max(1, MOST_ENTRIES // (1 + len(scores[start].top)))
        piece = list(scores[start : start + length])
        yield Update(request_id=request_id, index=index, prompt_logprobs=piece, prompt_index=scored + start)
        start += length


def messages(updates: Sequence[Update]) -> Iterator[list[Update]]:
    """Yields the updates of one Progress message after another. The updates of each request stay in order."""
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
    """Returns how many log-probabilities an update has (for tokens, prompt positions and alternatives), at least 1."""
    found = max(1, len(update.tokens))
    for scores in (update.logprobs, update.prompt_logprobs):
        if scores is not None:
            found += sum(len(each.top) + len(each.asked) for each in scores)
    return found if update.prompt_logprobs is None else found + len(update.prompt_logprobs)
