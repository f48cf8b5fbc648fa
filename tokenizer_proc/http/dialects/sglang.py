"""The responses of /generate: cumulative text and ids, finish reasons as objects, log-probabilities as triples."""

from __future__ import annotations

import time
from collections.abc import Sequence

import msgspec

from engine.errors import InvalidRequest
from engine.messages import Delta
from tokenizer_proc.http.batch import Batch, Choice
from tokenizer_proc.http.dialects import logprobs
from tokenizer_proc.http.encoding import in_slices
from tokenizer_proc.http.generation import Writer
from tokenizer_proc.text.tokenizer import Tokenizer


class LogprobOptions(msgspec.Struct, frozen=True):
    """The log-probabilities that were requested for one prompt and its outputs.

    Each position has the `top` best tokens, with their texts if `with_text` is set. `start` is the first position of
    the prompt to return; -1: none of the prompt.
    """

    start: int
    top: int
    with_text: bool


class NativeWriter(Writer):
    """Writes responses in SGLang's format.

    Without `is_list` the response is the object of the one choice; with it, a list with an object for each choice, and
    each event has its choice's index. `rids` are the ids of the prompts.
    """

    def __init__(
        self,
        rids: Sequence[str],
        scoring: Sequence[LogprobOptions | None],
        is_list: bool,
        tokenizers: Sequence[Tokenizer],
    ) -> None:
        self._rids = rids
        self._tokenizers = tokenizers
        self._scoring = scoring
        self._is_list = is_list
        self._begun = time.monotonic()
        self._prompts: dict[int, dict[str, object]] = {}

    def check(self, batch: Batch) -> None:
        """Raises InvalidRequest if a `logprob_start_len` is larger than its prompt's length."""
        for prompt, scoring in zip(batch.prompts, self._scoring, strict=True):
            length = len(prompt.token_ids)
            if scoring is not None and scoring.start > length:
                raise InvalidRequest(
                    f"logprob_start_len = {scoring.start} lies behind the prompt of {length} tokens",
                    param="logprob_start_len",
                )

    def events(self, batch: Batch, choice: Choice, delta: Delta) -> list[object]:
        """Returns one event with all of the choice's output so far, or none if the delta is empty."""
        if not (delta.text or delta.token_ids or delta.finish_reason):
            return []
        return [self._choice(choice) | ({"index": choice.number} if self._is_list else {})]

    def last_events(self, batch: Batch) -> list[object]:
        """Returns no events, because the last event of each choice already has its full output."""
        return []

    def whole(self, batch: Batch) -> object:
        """Returns the object of the one choice, or the list of the objects of all choices."""
        answers = [self._choice(choice) for choice in batch.choices]
        return answers if self._is_list else answers[0]

    def _choice(self, choice: Choice) -> dict[str, object]:
        return {"text": choice.text, "output_ids": choice.token_ids, "meta_info": self._meta(choice)}

    def _meta(self, choice: Choice) -> dict[str, object]:
        usage, rid = choice.usage, self._rids[choice.item]
        meta: dict[str, object] = {
            "id": rid if choice.index == 0 else f"{rid}-{choice.index}",
            "finish_reason": _finish_reason(choice),
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "cached_tokens": usage.cached_tokens,
        }
        if choice.finish_reason is not None:
            meta["e2e_latency"] = time.monotonic() - self._begun
        scoring = self._scoring[choice.item]
        return meta if scoring is None else meta | self._of_prompt(choice, scoring) | _logprobs(choice, scoring)

    def _of_prompt(self, choice: Choice, scoring: LogprobOptions) -> dict[str, object]:
        """Returns the fields with the prompt's log-probabilities.

        Every event repeats these fields, so they are encoded only once, when all log-probabilities have arrived.
        """
        if choice.prompt.logprobs is None:
            return _prompt_logprobs(choice, scoring, self._tokenizers[choice.item])
        found = self._prompts.get(choice.item)
        if found is None:
            values = _prompt_logprobs(choice, scoring, self._tokenizers[choice.item])
            found = {name: msgspec.Raw(in_slices(value)) for name, value in values.items()}
            self._prompts[choice.item] = found
        return found


def _finish_reason(choice: Choice) -> dict[str, object] | None:
    match choice.finish_reason:
        case None:
            return None
        case "stop":
            return {"type": "stop", "matched": choice.stop_reason}
        case "length":
            return {"type": "length", "length": choice.usage.completion_tokens}
        case "abort":
            return {"type": "abort", "message": "aborted"}


def _logprobs(choice: Choice, scoring: LogprobOptions) -> dict[str, object]:
    found: dict[str, object] = {"output_token_logprobs": logprobs.triples(choice.logprobs, scoring.with_text)}
    if scoring.top:
        found["output_top_logprobs"] = logprobs.top_triples(choice.logprobs, scoring.with_text)
    return found


def _prompt_logprobs(choice: Choice, scoring: LogprobOptions, tokenizer: Tokenizer) -> dict[str, object]:
    found: dict[str, object] = {"input_token_logprobs": _input(choice, scoring, tokenizer)}
    if scoring.top:
        prompt = (choice.prompt.logprobs or [])[max(scoring.start, 0) :]
        found["input_top_logprobs"] = logprobs.top_triples(prompt, scoring.with_text)
    return found


def _input(choice: Choice, scoring: LogprobOptions, tokenizer: Tokenizer) -> list[logprobs.Triple]:
    """Returns the triples of the prompt's tokens from `start` on.

    The log-probability of the prompt's first token is None, because no token precedes it.
    """
    prompt = choice.prompt
    if scoring.start < 0 or prompt.logprobs is None:
        return []
    found: list[logprobs.Triple] = []
    for token_id, position in [*zip(prompt.token_ids, prompt.logprobs, strict=True)][scoring.start :]:
        if position is not None:
            found.append(logprobs.triple(position.chosen, scoring.with_text))
        else:
            found.append((None, token_id, tokenizer.token_text(token_id) if scoring.with_text else None))
    return found
