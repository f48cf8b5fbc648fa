"""The output of one choice of a request: updates with token ids in, deltas with text out. Uses no sockets and no clock.

Update(index, tokens) -> duplicates dropped -> detokenizer -> stop strings -> Delta(text, token_ids, ...)
                         a gap is an error
"""

from __future__ import annotations

from collections.abc import Sequence

from engine.errors import InternalError
from engine.messages import (
    Delta,
    FinishReason,
    LogprobIds,
    PositionLogprobs,
    TokenLogprob,
    Update,
    Usage,
)
from tokenizer_proc.requests.validation import TextOptions
from tokenizer_proc.text.detokenize import Detokenizer
from tokenizer_proc.text.stop_patterns import StopPatterns
from tokenizer_proc.text.stops import StopFinder
from tokenizer_proc.text.tokenizer import Tokenizer


class OutputProcessor:
    """Makes the deltas of choice `index` of the submit `submit_id`. `finish` is None until the last delta is made."""

    def __init__(
        self,
        submit_id: int,
        index: int,
        prompt: list[int],
        options: TextOptions,
        tokenizer: Tokenizer,
        scores_prompt: bool = False,
    ) -> None:
        self._submit_id = submit_id
        self._index = index
        self._prompt = prompt
        self._options = options
        self._tokenizer = tokenizer
        self._scores_prompt = scores_prompt
        self._detokenizer = Detokenizer(tokenizer, prompt, options.skip_special_tokens)
        self._stops = StopFinder(options.stop, options.include_stop)
        self._patterns = StopPatterns(options.stop_regex)
        self._scored = 0  # the number of prompt positions whose log-probabilities have arrived
        self._scores_begun = False
        self._cached = 0
        self._has_begun = False
        self.generated: list[int] = []
        self.finish: FinishReason | None = None

    @property
    def matched_stop(self) -> bool:
        """Whether a stop string or expression ended the choice. The scheduler may still be generating for it."""
        return self._matched is not None

    @property
    def _matched(self) -> str | None:
        return self._stops.matched or self._patterns.matched

    def process(self, update: Update) -> Delta | None:
        """Returns the delta of an update, or None if the update has nothing new. Raises InternalError for a gap."""
        assert self.finish is None, "a finished choice gets no more updates"
        skip = len(self.generated) - update.index
        if skip < 0:
            raise InternalError(f"tokens {len(self.generated)} to {update.index} of a request were lost")
        self._cached = max(self._cached, update.cached_tokens)
        scored_prompt = self._read_scores(update)
        ended_by = update.stop_reason if update.finish == "stop" else None
        tokens, text = self._read(update.tokens[skip:], ended_by)
        self.finish = update.finish
        if self._options.scores_only and tokens:
            return self._score(scored_prompt)
        if self.finish is not None and not self.matched_stop:
            text += self._stops.push(self._detokenizer.flush()) + self._stops.flush()
        stop_reason: str | int | None = ended_by
        if self._matched is not None:
            self.finish, stop_reason = "stop", self._matched
        if not tokens and self.finish is None and scored_prompt is None:
            return None
        scores = update.logprobs[skip : skip + len(tokens)] if update.logprobs is not None else []
        return self._delta(text, tokens, stop_reason, scores, scored_prompt)

    def abort(self) -> Delta:
        """Ends the choice early with finish reason abort. Returns its last delta."""
        self.finish = "abort"
        return self._delta(self._stops.push(self._detokenizer.flush()) + self._stops.flush(), [], None, [], None)

    def _score(self, scored_prompt: list[PositionLogprobs | None] | None) -> Delta:
        """Ends a choice that only scores its prompt: the token shows that the prompt is done, and is dropped."""
        self.generated.clear()
        self.finish = "length"
        return self._delta("", [], None, [], scored_prompt)

    def _read_scores(self, update: Update) -> list[PositionLogprobs | None] | None:
        """Returns the log-probabilities of the prompt's next positions, or None if the update has no new ones.

        The entry of the prompt's first position is None, because no token precedes it.
        """
        if not self._scores_prompt:
            return None
        skip = self._scored - update.prompt_index
        if update.prompt_logprobs and skip < 0:
            raise InternalError(f"prompt positions {self._scored} to {update.prompt_index} of a request were lost")
        found = [self._position(each) for each in (update.prompt_logprobs or [])[skip:]]
        self._scored += len(found)
        if self._scores_begun:
            return [*found] or None
        if not (found or update.tokens or update.finish):
            return None
        self._scores_begun = True
        return [None, *found]

    def _read(self, tokens: Sequence[int], ended_by: int | None) -> tuple[list[int], str]:
        """Returns the tokens up to the one that completes a stop string, and their text.

        `ended_by` is the end token that finished the choice, if any; its text is left out unless `include_stop` is set.
        """
        text = ""
        for place, token in enumerate(tokens):
            number = len(self.generated)
            self.generated.append(token)
            if ended_by is not None and place == len(tokens) - 1 and not self._options.include_stop:
                continue
            new = self._detokenizer.push((token,))
            if number < self._options.min_tokens:
                text += new
                continue
            text += self._stops.push(new)
            if self._stops.matched is None and self._patterns.push(new):
                text += self._stops.flush()
            if self.matched_stop:
                return list(tokens[: place + 1]), text
        return list(tokens), text

    def _delta(
        self,
        text: str,
        tokens: list[int],
        stop_reason: str | int | None,
        scores: Sequence[LogprobIds],
        scored_prompt: list[PositionLogprobs | None] | None,
    ) -> Delta:
        is_first, self._has_begun = not self._has_begun, True
        usage = Usage(len(self._prompt), len(self.generated), self._cached) if self.finish is not None else None
        return Delta(
            id=self._submit_id,
            index=self._index,
            text=text,
            token_ids=tokens,
            finish_reason=self.finish,
            stop_reason=stop_reason,
            usage=usage,
            logprobs=[self._position(each) for each in scores] if self._options.has_logprobs else None,
            prompt_logprobs=scored_prompt,
            prompt_token_ids=self._prompt if is_first and self._index == 0 else None,
        )

    def _position(self, ids: LogprobIds) -> PositionLogprobs:
        return PositionLogprobs(
            self._token(ids.token_id, ids.logprob),
            [self._token(token_id, value) for token_id, value in ids.top],
            [self._token(*pair) for pair in zip(self._options.token_ids_logprob, ids.asked, strict=False)],
        )

    def _token(self, token_id: int, logprob: float) -> TokenLogprob:
        return TokenLogprob(token_id, logprob, *self._tokenizer.pieces.shown(token_id))
