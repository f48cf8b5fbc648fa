"""The responses of /generate: cumulative text and ids, finish reasons as objects, log-probabilities as triples."""

from __future__ import annotations

import time
from collections.abc import Sequence

import msgspec

from engine.errors import InvalidRequest
from engine.messages import Delta, PositionLogprobs
from tokenizer_proc.http.batch import Batch, Choice
from tokenizer_proc.http.dialects import logprobs
from tokenizer_proc.http.encoding import JsonArray
from tokenizer_proc.http.generation import Writer
from tokenizer_proc.text.tokenizer import Tokenizer


class LogprobOptions(msgspec.Struct, frozen=True):
    """The log-probabilities that were requested for one prompt and its outputs.

    Each position has the `top` best tokens, with their texts if `with_text` is set, and those of the ids `asked`.
    `start` is the first position of the prompt to return; -1: none of the prompt.
    """

    start: int
    top: int
    with_text: bool
    asked: list[int] = []


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
        self._outputs: dict[int, _Output] = {}

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
        return meta if scoring is None else meta | self._of_prompt(choice, scoring) | self._of_output(choice, scoring)

    def _of_prompt(self, choice: Choice, scoring: LogprobOptions) -> dict[str, object]:
        """Returns the fields with the prompt's log-probabilities.

        Every event repeats these fields, so they are encoded only once, when all log-probabilities have arrived.
        """
        if choice.prompt.logprobs is None:
            return _prompt_logprobs(choice, scoring, self._tokenizers[choice.item])
        found = self._prompts.get(choice.item)
        if found is None:
            found = self._prompts[choice.item] = _prompt_logprobs(choice, scoring, self._tokenizers[choice.item])
        return found

    def _of_output(self, choice: Choice, scoring: LogprobOptions) -> dict[str, object]:
        """Returns the fields with the log-probabilities of the choice's tokens so far. Each is encoded once."""
        output = self._outputs.get(choice.number)
        if output is None:
            output = self._outputs[choice.number] = _Output()
        return output.fields(choice, scoring)


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


class _Output:
    """The log-probabilities of one choice's tokens, encoded as they arrive, because every event repeats them."""

    def __init__(self) -> None:
        self._chosen = JsonArray()
        self._top = JsonArray()
        self._asked = JsonArray()
        self._length = 0

    def fields(self, choice: Choice, scoring: LogprobOptions) -> dict[str, object]:
        """Returns the fields with all of the choice's log-probabilities so far."""
        for positions in map(logprobs.filled, choice.logprobs.slices(self._length)):
            self._chosen.add(logprobs.triples(positions, scoring.with_text))
            if scoring.top:
                self._top.add(logprobs.top_triples(positions, scoring.with_text))
            if scoring.asked:
                self._asked.add(logprobs.asked_triples(positions, scoring.with_text))
            self._length += len(positions)
        return _named("output", scoring, self._chosen, self._top, self._asked)


def _prompt_logprobs(choice: Choice, scoring: LogprobOptions, tokenizer: Tokenizer) -> dict[str, object]:
    """Returns the fields with the log-probabilities of the prompt's tokens from `start` on, empty until all are there.

    The log-probability of the prompt's first token is None, because no token precedes it.
    """
    chosen, top, asked, place = JsonArray(), JsonArray(), JsonArray(), max(0, scoring.start)
    positions, token_ids = choice.prompt.logprobs, choice.prompt.token_ids
    for some in () if positions is None or scoring.start < 0 else positions.slices(place):
        ids = token_ids[place : place + len(some)]
        chosen.add([_prompt_triple(*pair, scoring, tokenizer) for pair in zip(ids, some, strict=True)])
        if scoring.top:
            top.add(logprobs.top_triples(some, scoring.with_text))
        if scoring.asked:
            asked.add(logprobs.asked_triples(some, scoring.with_text))
        place += len(some)
    return _named("input", scoring, chosen, top, asked)


def _named(
    side: str, scoring: LogprobOptions, chosen: JsonArray, top: JsonArray, asked: JsonArray
) -> dict[str, object]:
    """Returns the fields of the prompt (`input`) or of the output, those that were requested."""
    found: dict[str, object] = {f"{side}_token_logprobs": chosen.raw()}
    found |= {f"{side}_top_logprobs": top.raw()} if scoring.top else {}
    return found | ({f"{side}_token_ids_logprobs": asked.raw()} if scoring.asked else {})


def _prompt_triple(
    token_id: int, position: PositionLogprobs | None, scoring: LogprobOptions, tokenizer: Tokenizer
) -> logprobs.Triple:
    if position is not None:
        return logprobs.triple(position.chosen, scoring.with_text)
    return None, token_id, tokenizer.token_text(token_id) if scoring.with_text else None
