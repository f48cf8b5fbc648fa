"""When a request ends, and how long it may become. Knows no text: the tokenizer process matches stop strings."""

from __future__ import annotations

from engine.messages import Capacity, FinishReason
from scheduler.requests.request import Request

MAX_TOKEN = (1 << 31) - 1


def fit_to_capacity(request: Request, capacity: Capacity) -> str | None:
    """Sets the length at which the request ends. Returns the error if no token fits after the prompt.

    The last token is sampled but never computed, so it needs no page.
    """
    longest = min(capacity.max_length, capacity.kv_pages * capacity.page_size + 1)
    if request.prompt_length < 1:
        return "the prompt is empty; it must have at least one token"
    if not 0 <= min(request.tokens) <= max(request.tokens) <= MAX_TOKEN:
        return f"a token id is not in 0 to {MAX_TOKEN}"
    if request.prompt_length >= longest:
        return (
            f"the prompt has {request.prompt_length} tokens, but at most {longest - 1} fit beside a generated one; "
            "shorten it"
        )
    request.limit = min(request.prompt_length + request.stopping.max_tokens, longest)
    return None


def finish_of(request: Request) -> tuple[FinishReason, int | None] | None:
    """Returns (finish reason, the end id that matched) if the last known token ends the request, else None.

    Only a generated token can end a request; the end id is None if the length limit ended it.
    """
    count = request.generated
    if count == 0:
        return None
    token, stopping = request.tokens[-1], request.stopping
    if token in stopping.end_ids and count > stopping.min_tokens:
        return "stop", token
    return ("length", None) if len(request.tokens) >= request.limit else None
